def test_gelu_linear(bench_op, shape):
    """Half as many channels out as in; the passes over activations are those of a block's second linear layer."""
    size, C = shape
    bench_op("gelu_linear", (size, 4 * C))

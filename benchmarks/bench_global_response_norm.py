def test_global_response_norm(bench_op, shape):
    """With the GELU before it, on the wide side of a ConvNeXt V2 block."""
    size, C = shape
    bench_op("global_response_norm", (size, 4 * C))

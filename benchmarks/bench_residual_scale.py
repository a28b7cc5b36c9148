def test_residual_scale(bench_op, shape):
    bench_op("residual_scale", shape)

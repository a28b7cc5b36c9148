def test_depthwise_conv_norm(bench_op, shape):
    bench_op("depthwise_conv_norm", shape)

def test_depthwise_conv(bench_op, shape):
    bench_op("depthwise_conv", shape)

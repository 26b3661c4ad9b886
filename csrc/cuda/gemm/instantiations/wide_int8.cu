#include "../wide_launch.cuh"

template void grok::cuda::gemm::wide::grouped_gemm<grok::cuda::gemm::wide::Int8>(const GroupedGemm&, int64_t, Stream);
template void grok::cuda::gemm::wide::gate_up<grok::cuda::gemm::wide::Int8>(const GateUp&, int64_t, Stream);

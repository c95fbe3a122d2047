#include "softmax_registers.cuh"

namespace gol {
namespace cuda {
template cudaError_t launch_softmax_registers<__half>(const SoftmaxArgs&, cudaStream_t);
}
}  // namespace gol

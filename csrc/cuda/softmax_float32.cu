#include "softmax_registers.cuh"

namespace gol {
namespace cuda {
template cudaError_t launch_softmax_registers<float>(const SoftmaxArgs&, cudaStream_t);
}
}  // namespace gol

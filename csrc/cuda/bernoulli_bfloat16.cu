#include "bernoulli_flat.cuh"

namespace gol {
namespace cuda {
template cudaError_t launch_flat_type<__nv_bfloat16>(const BernoulliArgs&, cudaStream_t);
}
}  // namespace gol

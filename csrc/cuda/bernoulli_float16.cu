#include "bernoulli_flat.cuh"

namespace gol {
namespace cuda {
template cudaError_t launch_flat_type<__half>(const BernoulliArgs&, cudaStream_t);
}
}  // namespace gol

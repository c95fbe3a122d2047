#include "bernoulli_flat.cuh"

namespace gol {
namespace cuda {
template cudaError_t launch_flat_type<float>(const BernoulliArgs&, cudaStream_t);
}
}  // namespace gol

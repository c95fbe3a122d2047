// The kernels for any processor, in plain C++.
#include "lanes_generic.h"
// lanes first: the kernels are written in its terms
#include "bernoulli_kernel.h"
#include "softmax_kernel.h"
#include "table.h"

namespace gol {
namespace cpu {
const KernelTable kGenericKernels = {"generic", GOL_ISA::bernoulli, GOL_ISA::softmax,
                                     GOL_ISA::gumbel_activation};
}  // namespace cpu
}  // namespace gol

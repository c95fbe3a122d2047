// What the kernels of every device take and the ops' options name. No torch headers.
#pragma once

#include <cstdint>

namespace gol {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum class Link { kGumbel, kGumbelReleased, kSigmoid, kProbit };
enum class Reweight { kNone, kEQL, kDrop, kFederated, kACSL, kWeights, kSeesaw };
enum class SoftmaxReweight { kNone, kPrior, kSeesaw };

struct LinkOptions {
  double temperature;
  double clip_min, clip_max;
  double edge;  // outside the clip the slope is edge times the one at the clip's edge: 0, or 1
                // (straight-through)
};

// p = exp(-exp(-z/T)), or with grad_output its backward grad_output * dp/dz; [numel] dense each.
struct GumbelActivationArgs {
  DType dtype;
  const void* logits;
  const void* grad_output;  // null: the activation
  void* output;
  int64_t numel;
  LinkOptions link_options;
};

}  // namespace gol

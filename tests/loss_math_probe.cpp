// csrc/loss_math.h as a shared library: every formula over arrays, in float and in double.
#include <cmath>
#include <cstdint>

#include "../csrc/loss_math.h"

namespace {

using namespace gol;

// out: [7, n] loss and slope of a positive, loss and slope of a negative, log2 p, p, factor.
template <class V, class Link> void link_values(const LinkOptions& options, const V* z, int64_t n, V* out) {
  const Link link(options);
  for (int64_t i = 0; i < n; ++i) {
    const PositiveTerm<V> p = link.positive(z[i]);
    const NegativeTerm<V> t = link.negative(z[i]);
    out[i] = p.loss;
    out[n + i] = p.slope;
    out[2 * n + i] = V(kLn2) * (t.linear - gol::log2(t.factor));
    out[3 * n + i] = V(link.unit) * t.slope;
    out[4 * n + i] = link.log2_probability(z[i]);
    out[5 * n + i] = link.probability(z[i]);
    out[6 * n + i] = t.factor;
  }
}

template <class V>
int link_values_by_name(int link, double temperature, double clip_min, double clip_max, double edge,
                        const V* z, int64_t n, V* out) {
  const LinkOptions options{temperature, clip_min, clip_max, edge};
  if (link == 0) link_values<V, GumbelLink<V, false>>(options, z, n, out);
  else if (link == 1) link_values<V, GumbelLink<V, true>>(options, z, n, out);
  else if (link == 2) link_values<V, SigmoidLink<V>>(options, z, n, out);
  else link_values<V, ProbitLink<V>>(options, z, n, out);
  return link == 0   ? GumbelLink<V, false>::kMaxProduct
         : link == 1 ? GumbelLink<V, true>::kMaxProduct
         : link == 2 ? SigmoidLink<V>::kMaxProduct
                     : ProbitLink<V>::kMaxProduct;
}

// out: [2, n] mitigation of power[i] and compensation of x[i] in one row.
template <class V>
void seesaw_values(double power_y, double q, double threshold, const V* power, const V* x, int64_t n,
                   V* out) {
  const SeesawRow<V> row(power_y, q, threshold);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = row.mitigation(power[i]);
    out[n + i] = row.compensation(x[i]);
  }
}

}  // namespace

extern "C" {
int link_float(int link, double t, double lo, double hi, double edge, const float* z, int64_t n, float* out) {
  return link_values_by_name<float>(link, t, lo, hi, edge, z, n, out);
}
int link_double(int link, double t, double lo, double hi, double edge, const double* z, int64_t n,
                double* out) {
  return link_values_by_name<double>(link, t, lo, hi, edge, z, n, out);
}
void seesaw_float(double power_y, double q, double threshold, const float* power, const float* x, int64_t n,
                  float* out) {
  seesaw_values<float>(power_y, q, threshold, power, x, n, out);
}
void seesaw_double(double power_y, double q, double threshold, const double* power, const double* x,
                   int64_t n, double* out) {
  seesaw_values<double>(power_y, q, threshold, power, x, n, out);
}
void philox(uint32_t c0, uint32_t c1, uint64_t c23, uint64_t key, uint32_t* out) {
  const Philox4<uint32_t> words = philox4x32_10(c0, c1, c23, key);
  for (int i = 0; i < 4; ++i) out[i] = words.word[i];
}
}

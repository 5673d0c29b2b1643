// The tangent operators' part of an instruction set's table.
#pragma once

#include "activations.h"
#include "attention_tangent.h"
#include "batch_norm_tangent.h"
#include "kernels.h"
#include "layer_norm_tangent.h"

namespace curveball::cpu {
namespace {

constexpr Kernels with_tangents(Kernels k) {
  k.tangents.activation[kGelu][kFloat32] = activation_block<float, gelu>;
  k.tangents.activation[kGelu][kFloat64] = activation_block<double, gelu>;
  k.tangents.activation[kGeluTanh][kFloat32] = activation_block<float, gelu_tanh>;
  k.tangents.activation[kGeluTanh][kFloat64] = activation_block<double, gelu_tanh>;
  k.tangents.activation[kSilu][kFloat32] = activation_block<float, silu>;
  k.tangents.activation[kSilu][kFloat64] = activation_block<double, silu>;
  k.tangents.layer_norm[kFloat32] = layer_norm_rows<float>;
  k.tangents.layer_norm[kFloat64] = layer_norm_rows<double>;
  k.tangents.batch_norm_planes[kFloat32] = batch_norm_planes<float>;
  k.tangents.batch_norm_planes[kFloat64] = batch_norm_planes<double>;
  k.tangents.batch_norm_sums[kFloat32] = batch_norm_sums<float>;
  k.tangents.batch_norm_sums[kFloat64] = batch_norm_sums<double>;
  k.tangents.batch_norm_rows[kFloat32] = batch_norm_rows<float>;
  k.tangents.batch_norm_rows[kFloat64] = batch_norm_rows<double>;
  k.tangents.attention[kFloat32] = attention_block<float>;
  k.tangents.attention[kFloat64] = attention_block<double>;
  return k;
}

}  // namespace
}  // namespace curveball::cpu

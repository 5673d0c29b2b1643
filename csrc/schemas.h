// The schemas of all operators, once: the CPU library defines them as curveball_fused::*, the emulated CUDA kernels of
// the tests as curveball_emulated::*. curveball_fused/ops/ says what each computes.
#pragma once

#include <torch/csrc/stable/library.h>

namespace curveball {

inline void define_operators(torch::stable::detail::StableLibrary& library) {
  for (const char* schema : {
           "update_(Tensor(a!)[] params, Tensor(b!)[] z, Tensor[] r, Tensor scalars, int[] group_sizes, float[] lr, "
           "float[] weight_decay, Tensor? lr_tensor=None) -> Tensor",
           "dots(Tensor[] z, Tensor[] r) -> Tensor",
           "precondition_(Tensor(a!)[] u, Tensor(b!)[] v, Tensor[] r, Tensor[] z, Tensor weight, float decay, "
           "float eps, Tensor? scalars=None) -> Tensor",
           "precondition_in_bases(Tensor(a!)[] u, Tensor(b!)[] turned, Tensor[] v, Tensor[] r, Tensor[] z, "
           "Tensor[] bases, int[] sides, Tensor weight, float decay, float eps) -> Tensor",
           "update_statistics_(Tensor(a!)[] v, Tensor[] turned, Tensor(b!)[] factors, Tensor[] r, int[] sides, "
           "Tensor weight, float decay, Tensor scalars, bool gather) -> Tensor",
           "solve(Tensor scalars, Tensor loss, Tensor products, Tensor? dots, float? beta, float? rho, float lr, "
           "Tensor? lr_tensor=None, float theta=1.0, float average=0.0, bool bounded=False) -> Tensor",
           "adapt_damping(Tensor scalars, Tensor new_loss, float low, float high, float factor, float minimum, "
           "float maximum) -> Tensor",
           "keep_coefficients(Tensor scalars, Tensor loss, Tensor slope, Tensor? room, float sign) -> Tensor",

           "cross_entropy_cotangent(Tensor x, Tensor v, Tensor target, Tensor? weight, int ignore_index, bool mean, "
           "float label_smoothing, float sign) -> (Tensor loss, Tensor c, Tensor products, Tensor row_stats)",
           "cross_entropy_products(Tensor x, Tensor v, Tensor u, Tensor target, Tensor? weight, Tensor row_stats, "
           "Tensor products, int ignore_index, bool mean, float label_smoothing, float sign) -> Tensor",
           "mse_cotangent(Tensor x, Tensor v, Tensor target, bool mean, float sign) "
           "-> (Tensor loss, Tensor c, Tensor products)",
           "mse_products(Tensor x, Tensor v, Tensor u, Tensor target, Tensor products, bool mean, float sign) -> "
           "Tensor",
           "bce_cotangent(Tensor x, Tensor v, Tensor target, Tensor? weight, Tensor? pos_weight, bool mean, "
           "float sign) -> (Tensor loss, Tensor c, Tensor products)",
           "bce_products(Tensor x, Tensor v, Tensor u, Tensor target, Tensor? weight, Tensor? pos_weight, "
           "Tensor products, bool mean, float sign) -> Tensor",

           "layer_norm_tangent(Tensor dx, Tensor x, Tensor? mean, Tensor rstd, Tensor? weight, Tensor? dweight, "
           "Tensor? dbias) -> Tensor",
           "batch_norm_tangent(Tensor dx, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? dweight, "
           "Tensor? dbias, bool training) -> Tensor",
           "attention_tangent(Tensor dq, Tensor dk, Tensor dv, Tensor q, Tensor k, Tensor v, Tensor out, Tensor? mask, "
           "bool is_causal, float scale) -> Tensor",
           "activation(Tensor x, str name) -> (Tensor y, Tensor derivative)",
       }) {
    library.def(schema);
  }
}

}  // namespace curveball

"""Mistakes in the package that the tests must notice: a replacement of text, and a check that must then fail."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PythonMutant:
    name: str
    file: str  # in curveball_fused/
    old: str  # occurs there once
    new: str
    check: str  # a fast test in tests/
    only: str = "test"  # as in `pytest -k`: those of its cases that count


TAPE_RULES = [
    PythonMutant(
        "linear_forgets_the_tangent_of_its_weight",
        "curvature/rules/products.py",
        "tangent.view(-1, w.shape[0]).addmm_(x.reshape(-1, w.shape[1]), dw.t())",
        "tangent.view(-1, w.shape[0]).add_(0)",
        "curvature/test_linear_map.py::test_adjoint_identities",
    ),
    PythonMutant(
        "the_padding_row_gets_a_tangent",
        "curvature/rules/products.py",
        "tangent if padded is None else tangent.masked_fill_(padded, 0)",
        "tangent",
        "curvature/test_dual_rules.py::test_padding_index_gets_no_tangent_as_it_gets_no_gradient",
    ),
    PythonMutant(
        "a_difference_has_the_tangent_of_a_sum",
        "curvature/rules/structural.py",
        "return torch.add(a, b, alpha=factor)",
        "return torch.add(a, b)",
        "curvature/test_tape.py::test_equals_dual_numbers",
        "activations or arrangements",
    ),
    PythonMutant(
        "a_constant_written_into_a_tensor_leaves_its_tangent",
        "curvature/rules/structural.py",
        "tangent[index] = 0 if b is None else b",
        "tangent[index] = tangent[index] if b is None else b",
        "curvature/test_tape.py::test_equals_dual_numbers",
        "place",
    ),
    PythonMutant(
        "group_norm_forgets_its_weight",
        "curvature/rules/normalizations.py",
        "tangent = tangent if w is None else tangent.mul_(w)",
        "tangent = tangent if w is None else tangent.mul_(1)",
        "curvature/test_dual_rules.py::test_rules_against_finite_differences",
        "group",
    ),
    PythonMutant(
        "the_tape_takes_a_tensor_that_was_written_to_for_the_one_it_knows",
        "curvature/tape.py",
        "if known[2] != version_of(tensor):",
        "if known[2] > version_of(tensor):",
        "curvature/test_tape.py::test_what_it_cannot_follow_is_refused_and_nothing_changes",
        "written",
    ),
]

QUADRATIC_MODEL = [
    PythonMutant(
        "adjointness_is_trusted_although_a_hook_has_altered_the_gradient",
        "quadratic_model.py",
        "adjoint = not context.hooked and ",
        "adjoint = ",
        "optimizer/test_safety.py::test_gradient_hooks_are_accounted_for",
    ),
    PythonMutant(
        "the_gradient_of_a_part_is_counted_beside_that_of_the_whole",
        "quadratic_model.py",
        "linear.vjp(c - loss_model.gradient())",
        "linear.vjp(c)",
        "optimizer/test_preconditioner.py::test_equals_dense_matrices",
        "None-residual-0.7 and True and torch",
    ),
    PythonMutant(
        "the_gradient_of_the_usual_loss_is_halved",
        "backends/reference/closed_form_losses.py",
        "scale = 2.0 / ",
        "scale = 1.0 / ",
        "losses/test_loss_model.py::test_against_the_hessian",
        "mse and closed",
    ),
    PythonMutant(
        "outputs_that_were_written_to_are_taken_for_the_outputs",
        "losses/recognition.py",
        "return entry is not None and entry[2] == version_of(entry[0])",
        "return entry is not None",
        "losses/test_loss_model.py::test_is_not_mistaken_for_another",
    ),
    PythonMutant(
        "shares_of_the_outputs_cancel_in_the_size_of_a_loss",
        "losses/missing_curvature.py",
        "(gradient * outputs).abs().sum(",
        "(gradient * outputs).sum(",
        "losses/test_missing_curvature.py::test_the_matrix_in_its_place",
        "hinge and torch",
    ),
    PythonMutant(
        "what_a_run_by_dual_numbers_has_kept_is_a_constant_to_the_loss",
        "curvature/dual_numbers.py",
        "if _is_dual(ref())]",
        "if ref() is None]",
        "losses/test_hidden_tensors.py::test_refused_by_every_method",
        "forward",
    ),
]

SOLVE = [
    PythonMutant(
        "the_direction_has_all_of_the_residual_of_z",
        "backends/reference/solve.py",
        "a12 = z_hu + s * z_hz + lambd * dz",
        "a12 = z_hu + lambd * z_hz + lambd * dz",
        "ops/test_solve.py::test_minimizes_the_model_in_any_metric",
        "torch",
    ),
    PythonMutant(
        "beta_stays_as_it_was_where_rho_is_bounded",
        "backends/reference/solve.py",
        "torch.where(x2 == inside, x1, divide_or_zero(b1 - a12 * inside, a11)), inside",
        "x1, inside",
        "ops/test_solve.py::test_bounded_momentum_is_the_best_within_its_bounds",
        "torch",
    ),
    PythonMutant(
        "averages_are_biased_by_their_start",
        "backends/reference/solve.py",
        "(1 - 1 / (scalars[SOLVES] + 1)).clamp(max=average)",
        "torch.full_like(loss, average)",
        "ops/test_solve.py::test_coefficients_are_averaged_over_solves",
        "torch",
    ),
    PythonMutant(
        "averages_are_used_where_the_model_climbs",
        "backends/reference/solve.py",
        "2 * linear_term < quadratic_term",
        "2 * linear_term < torch.zeros_like(zz) * quadratic_term",
        "ops/test_solve.py::test_coefficients_are_averaged_over_solves",
        "torch",
    ),
    PythonMutant(
        "the_average_is_of_shortened_steps",
        "backends/reference/solve.py",
        "torch.where(finite, mean1, scalars[AVERAGE_BETA])",
        "torch.where(finite, x1, scalars[AVERAGE_BETA])",
        "ops/test_solve.py::test_coefficients_are_averaged_over_solves",
        "torch",
    ),
    PythonMutant(
        "a_skipped_step_enters_the_average",
        "backends/reference/solve.py",
        "torch.where(finite, -mean2, scalars[AVERAGE_RHO])",
        "-mean2",
        "ops/test_solve.py::test_coefficients_are_averaged_over_solves",
        "torch",
    ),
    PythonMutant(
        "coefficients_in_triton_know_no_bound",
        "backends/triton/solve.py",
        "inside = _in_bounds(x2)",
        "inside = x2",
        "backends/triton/test_solve.py::test_every_combination_of_options",
    ),
    PythonMutant(
        "the_loss_scale_stays_in_the_damping_of_the_direction",
        "loss_scale.py",
        "folded[DIRECTION_DAMPING].mul_(factor)",
        "folded[DIRECTION_DAMPING].mul_(1)",
        "optimizer/test_loss_scale.py::test_an_update_by_scaled_gradients_is_the_update",
    ),
]

REPLAY = [
    PythonMutant(
        "of_two_views_of_one_memory_the_newer_value_is_put_back",
        "replay/memory.py",
        "reversed(self._before.values())",
        "self._before.values()",
        "replay/test_replay.py::test_ratio_compares_the_same_function",
        "ticking",
    ),
    PythonMutant(
        "statistics_move_in_every_run",
        "replay/recorder.py",
        "    if name in _NORMALIZATIONS:",
        "    if name in ():",
        "replay/test_replay.py::test_a_step_leaves_what_one_run_leaves",
    ),
    PythonMutant(
        "python_draws_other_numbers_in_later_runs",
        "replay/generators.py",
        "random.setstate(states[0])",
        "states[0]",
        "replay/test_replay.py::test_a_step_leaves_what_one_run_leaves",
    ),
]

STATE = [
    PythonMutant(
        "damping_adapts_as_if_in_every_step",
        "step.py",
        "factor=settings.lambda_factor**settings.lambda_interval",
        "factor=settings.lambda_factor",
        "optimizer/test_oracle.py",
        "torch",
    ),
    PythonMutant(
        "the_step_count_of_the_state_stays_behind",
        "state.py",
        "        elif number != written.get(name):",
        "        elif not written:",
        "optimizer/test_state.py::test_a_checkpoint_resumes_bit_for_bit",
        "averages and flat and three",
    ),
    PythonMutant(
        "state_that_was_replaced_is_not_looked_at",
        "state.py",
        'elif shared is None or shared["scalars"] is not state[found]["scalars"]:',
        "elif shared is None:",
        "optimizer/test_state.py::test_a_checkpoint_resumes_bit_for_bit",
        "state_dict and averages",
    ),
    PythonMutant(
        "a_checkpoint_of_fewer_scalars_forgets_the_damping",
        "state.py",
        "entry[name][..., DIRECTION_DAMPING] = former[..., LAMBD]",
        "entry[name][..., DIRECTION_DAMPING] = 0",
        "optimizer/test_old_checkpoints.py::test_training_goes_on_from_fewer_scalars",
        "state_dict",
    ),
    PythonMutant(
        "a_parameter_within_another_is_not_seen",
        "checks.py",
        "reaching = [other for other in reaching if other[1] > first]",
        "reaching = [other for other in reaching if other[0] == first]",
        "optimizer/test_refused_parameters.py::test_two_parameters_over_one_memory_are_refused",
    ),
    PythonMutant(
        "the_history_begins_anew_after_its_last_row",
        "state.py",
        'range(shared["step"] - count, shared["step"])',
        "range(count)",
        "optimizer/test_history.py",
    ),
    PythonMutant(
        "the_loss_scale_stays_in_the_second_product",
        "loss_scale.py",
        "scaled.unscale(self._jvp(scaled.tangents)) / self._loss_scale.float()",
        "scaled.unscale(self._jvp(scaled.tangents))",
        "optimizer/test_loss_scale.py::test_small_gradients_do_not_vanish_in_float16",
        "linearize",
    ),
    PythonMutant(
        "a_product_holds_all_tangents_until_the_next",
        "curvature/tangent_maps.py",
        "        values.clear()",
        "        values.copy()",
        "curvature/test_recurrent.py::test_several_products_of_one_run",
    ),
    PythonMutant(
        "the_second_direction_reads_the_steps_in_the_order_of_the_first",
        "curvature/rules/recurrent.py",
        "ordered = None if dx is None else _in_order(dx, j)",
        "ordered = dx",
        "curvature/test_recurrent.py::test_equals_the_matrix",
        "True-True-3",
    ),
    PythonMutant(
        "a_loss_may_read_parameters_between_solves",
        "losses/loss_model.py",
        "if any(g is not None for g in others):",
        "if others is None:",
        "losses/test_hidden_tensors.py",
    ),
]

PRECONDITIONERS = [
    PythonMutant(
        "a_step_between_solves_takes_the_coefficients_of_the_last_batch_with_another_sign",
        "backends/reference/coefficients.py",
        "scalars[AVERAGE_BETA : AVERAGE_RHO + 1], torch.nan)",
        "-scalars[AVERAGE_BETA : AVERAGE_RHO + 1], torch.nan)",
        "optimizer/test_preconditioner.py::test_equals_dense_matrices",
        "kronecker-gradient-0.8 and False and torch",
    ),
    PythonMutant(
        "a_step_between_solves_promises_more_than_the_loss_has_to_give",
        "step.py",
        "room if settings.beta is None else None,",
        "None,",
        "optimizer/test_between_solves.py::test_beta_promises_no_more_than_the_loss_has_to_give",
    ),
    PythonMutant(
        "a_step_between_solves_is_as_long_as_the_loss_is_large",
        "backends/reference/coefficients.py",
        "room / slope, kept[0])",
        "room, kept[0])",
        "ops/test_coefficients.py::test_keep_coefficients",
        "torch",
    ),
    PythonMutant(
        "a_step_between_solves_remembers_a_maximized_loss_as_a_minimized_one",
        "step.py",
        "sign=settings.sign,\n        backend",
        "backend",
        "optimizer/test_between_solves.py::test_the_history_has_the_loss_that_was_returned",
    ),
    PythonMutant(
        "every_loss_is_taken_for_one_that_is_never_negative",
        "between_solves.py",
        "    if is_never_negative is True:\n        return loss",
        "    if sign > 0:\n        return loss",
        "optimizer/test_between_solves.py::test_beta_promises_no_more_than_the_loss_has_to_give",
    ),
    PythonMutant(
        "a_maximized_loss_is_bounded_as_a_minimized_one",
        "between_solves.py",
        "    if sign < 0:\n        is_never_negative = False",
        "    if sign > 1:\n        is_never_negative = False",
        "optimizer/test_between_solves.py::test_beta_promises_no_more_than_the_loss_has_to_give",
    ),
    PythonMutant(
        "pieces_of_a_side_meet_one_factor",
        "backends/reference/bases.py",
        "return product.flatten(0, 1)[: len(m)]",
        "return product.flip(0).flatten(0, 1)[: len(m)]",
        "optimizer/test_preconditioner.py::test_equals_dense_matrices",
        "kronecker-gradient-0.8 and False and torch",
    ),
    PythonMutant(
        "a_basis_is_turned_back_by_itself",
        "backends/reference/bases.py",
        "_on_columns(m, right.mT)",
        "_on_columns(m, right)",
        "optimizer/test_preconditioner.py::test_equals_dense_matrices",
        "kronecker-gradient-0.8 and False and torch",
    ),
    PythonMutant(
        "a_skipped_step_turns_the_bases",
        "preconditioners/bases.py",
        "torch.where(taken, refreshed(factor, basis), basis)",
        "refreshed(factor, basis)",
        "preconditioners/test_bases.py::test_a_skipped_step_refreshes_nothing",
    ),
    PythonMutant(
        "a_skipped_step_moves_the_factors",
        "backends/reference/bases.py",
        "_gather(r, left, right, decay, taken)",
        "_gather(r, left, right, decay, torch.ones_like(taken))",
        "ops/test_bases.py::test_a_step_that_is_skipped_leaves_everything",
        "torch",
    ),
    PythonMutant(
        "a_factor_overflows",
        "backends/reference/bases.py",
        ".square() <= limit).all()",
        ".square() <= torch.inf).all()",
        "ops/test_bases.py::test_a_trace_that_overflows_leaves_all_factors",
        "torch",
    ),
    PythonMutant(
        "squares_that_were_copied_are_not_written_back",
        "ops/bases.py",
        "zip(v, own_v, strict=True)",
        "zip([], [], strict=True)",
        "ops/test_bases.py::test_strides_and_half_precision",
        "cpu",
    ),
    PythonMutant(
        "factors_that_were_copied_are_not_written_back",
        "ops/bases.py",
        "zip(factors, own_factors, strict=True)",
        "zip([], [], strict=True)",
        "ops/test_bases.py::test_factors_that_are_not_contiguous_are_written",
        "cpu",
    ),
    PythonMutant(
        "the_average_of_squares_keeps_what_it_should_forget",
        "backends/reference/preconditioners.py",
        "decay * v_i + (1 - decay) * r_c.square()",
        "(1 - decay) * v_i + decay * r_c.square()",
        "ops/test_preconditioners.py::test_is_adams_step_without_momentum",
        "torch",
    ),
    PythonMutant(
        "the_bias_of_the_average_stays",
        "backends/reference/preconditioners.py",
        "(1 / root_weight).to(",
        "(root_weight / root_weight).to(",
        "ops/test_preconditioners.py::test_is_adams_step_without_momentum",
        "torch",
    ),
    PythonMutant(
        "an_infinite_diagonal_passes_for_a_step",
        "backends/reference/preconditioners.py",
        " + (v_new - v_new)",
        "",
        "ops/test_preconditioners.py::test_r_whose_square_overflows_is_told_by_the_sum",
        "torch",
    ),
    PythonMutant(
        "a_skipped_step_moves_the_average",
        "backends/reference/preconditioners.py",
        "torch.isfinite(scalars[BETA]) & torch.isfinite(scalars[RHO])",
        "torch.isfinite(scalars[BETA])",
        "ops/test_preconditioners.py::test_a_step_that_is_skipped_leaves_v",
        "torch",
    ),
    PythonMutant(
        "the_average_becomes_subnormal",
        "backends/reference/preconditioners.py",
        "v_new.masked_fill(v_new < info.tiny, 0)",
        "v_new.masked_fill(v_new < 0, 0)",
        "ops/test_preconditioners.py::test_nothing_becomes_subnormal",
        "torch",
    ),
    PythonMutant(
        "small_squares_are_forgotten",
        "backends/reference/preconditioners.py",
        "v_new.masked_fill(v_new < info.tiny, 0)",
        "v_new.masked_fill(v_new < info.tiny / info.eps, 0)",
        "ops/test_preconditioners.py::test_small_r_is_not_forgotten",
        "torch",
    ),
    PythonMutant(
        "an_average_that_was_copied_is_not_written_back",
        "ops/preconditioners.py",
        "            if copy is not original:",
        "            if copy is original:",
        "ops/test_preconditioners.py::test_against_float64",
        "torch",
    ),
    PythonMutant(
        "a_tensor_is_walked_in_the_order_of_another",
        "ops/_layouts.py",
        "        return b.is_contiguous()",
        "        return b.numel() > 0",
        "ops/test_preconditioners.py::test_against_float64",
        "cpu",
    ),
]

MONITORING = [
    PythonMutant(
        "a_warning_is_told_in_every_call",
        "advice.py",
        "        if kind not in said:",
        "        if text:",
        "monitoring/test_advice.py::test_each_kind_is_told_once_for_each_optimizer",
    ),
    PythonMutant(
        "steps_are_logged_again",
        "monitoring.py",
        "        if step > logged.get(prefix, 0):",
        "        if step > 0:",
        "monitoring/test_tensorboard.py::test_every_step_once_for_each_writer_and_prefix",
    ),
    PythonMutant(
        "the_file_of_another_training_is_written_over",
        "monitoring.py",
        "                if line not in rows[place : place + 1]:",
        "                if not line:",
        "monitoring/test_csv.py::test_what_is_not_its_own_it_leaves_alone",
    ),
]

MUTANTS = TAPE_RULES + QUADRATIC_MODEL + SOLVE + REPLAY + STATE + PRECONDITIONERS + MONITORING

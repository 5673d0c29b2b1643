"""Mistakes in the solve, replay and state; monitoring."""

from __future__ import annotations

from .mutant import PythonMutant

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

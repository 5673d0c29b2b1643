"""Mistakes in curvature and the quadratic model."""

from __future__ import annotations

from .mutant import PythonMutant

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
        "quadratic_model/measure.py",
        "(context.processes is not None or not context.hooked)",
        "True",
        "optimizer/test_safety.py::test_gradient_hooks_are_accounted_for",
    ),
    PythonMutant(
        "the_gradient_of_a_part_is_counted_beside_that_of_the_whole",
        "quadratic_model/runs.py",
        "c = c - g if along_z is None",
        "c = c if along_z is None",
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
        "terms.abs().sum(",
        "terms.sum(",
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

"""Mistakes in the kernels that the tests must notice: a replacement of text, and a check that must then fail."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # in csrc/
    old: str  # occurs there once
    new: str
    check: str  # a test in tests/backends/emulated/

    @property
    def unit(self) -> str:
        """The source in csrc/cuda/ whose kernels the check runs."""
        return "cross_entropy" if "test_cross_entropy" in self.check or "test_native_losses" in self.check else "ops"


LISTS = [
    Mutant(
        "no_barrier_before_the_warps_sums_are_read",
        "cuda/reduce.cuh",
        "__syncthreads();\n#pragma unroll\n",
        "\n#pragma unroll\n",
        "test_lists.py::test_update_of_long_tensors",
    ),
    Mutant(
        "no_barrier_before_shared_memory_is_used_again",
        "cuda/reduce.cuh",
        "lane * N + k] : 0.0);\n  __syncthreads();",
        "lane * N + k] : 0.0);",
        "test_lists.py::test_groups_of_many_chunks",
    ),
    Mutant(
        "half_a_warp_is_not_added",
        "cuda/reduce.cuh",
        "for (int distance = 16; distance > 0; distance /= 2) x +=",
        "for (int distance = 8; distance > 0; distance /= 2) x +=",
        "test_lists.py::test_dots_of_long_tensors",
    ),
    Mutant(
        "the_last_partial_sum_is_missing",
        "cuda/reduce.cuh",
        "i < end; i += blockDim.x",
        "i + 1 < end; i += blockDim.x",
        "test_lists.py::test_dots_of_long_tensors",
    ),
    Mutant(
        "the_last_element_is_missing",
        "cuda/lists.cuh",
        "count - vectors * N, [&]",
        "count - vectors * N - 1, [&]",
        "test_lists.py::test_update_of_long_tensors",
    ),
    Mutant(
        "vectors_that_are_not_aligned",
        "cuda/lists.cuh",
        "...)) return head;",
        "...)) return 0;",
        "test_lists.py::test_update_of_long_tensors",
    ),
    Mutant(
        "vectors_after_the_last_full_batch_are_missing",
        "cuda/lists.cuh",
        "for (; i < count; i += threads) take(i, load(i));",
        "",
        "test_lists.py::test_update_of_long_tensors",
    ),
    Mutant(
        "chunks_begin_at_32_bit_indices",
        "cuda/lists.cuh",
        "begin = static_cast<int64>(index) * kChunk",
        "begin = static_cast<int>(static_cast<unsigned>(index) * kChunk)",
        "test_numbers.py::test_more_than_2_31_elements",
    ),
    Mutant(
        "the_block_at_a_border_takes_the_tensor_before",
        "cuda/lists.cuh",
        "list.first_block[middle] <= block",
        "list.first_block[middle] < block",
        "test_lists.py::test_many_tensors",
    ),
    Mutant(
        "the_last_chunk_is_taken_as_full",
        "cuda/lists.cuh",
        "rest < kChunk ? static_cast<int>(rest) : kChunk",
        "kChunk",
        "test_lists.py::test_update_of_long_tensors",
    ),
    Mutant(
        "launches_write_over_each_others_sums",
        "cuda/lists.cuh",
        "list.first_partial[low] + index",
        "list.first_block[low] + index",
        "test_lists.py::test_many_tensors",
    ),
    Mutant(
        "all_groups_take_the_first_rate",
        "cuda/update.cuh",
        "learning_rate(lr_tensor, list.group[t], list.lr[t])",
        "learning_rate(lr_tensor, 0, list.lr[0])",
        "test_lists.py::test_groups",
    ),
    Mutant(
        "a_group_counts_the_groups_before_it",
        "cuda/update.cuh",
        "    begin = end;\n",
        "",
        "test_lists.py::test_groups",
    ),
    Mutant(
        "a_step_to_skip_is_taken",
        "cuda/update.cuh",
        "if (is_finite(beta) && is_finite(rho)) {",
        "if (is_finite(rho)) {",
        "test_numbers.py::test_a_skipped_step_changes_nothing",
    ),
    Mutant(
        "factors_are_rounded_before_they_are_subtracted",
        "formulas.h",
        "static_cast<T>(rho - beta * direction_damping)",
        "static_cast<T>(rho) - static_cast<T>(beta) * static_cast<T>(direction_damping)",
        "test_numbers.py::test_factors_are_formed_in_double",
    ),
    Mutant(
        "v_is_written_without_scalars",
        "cuda/preconditioner.cuh",
        "if (stores_v) store_vector",
        "store_vector",
        "test_preconditioner.py::test_precondition",
    ),
    Mutant(
        "v_moves_in_a_step_to_skip",
        "cuda/preconditioner.cuh",
        "is_finite(scalars[kBeta]) && is_finite(scalars[kRho])",
        "is_finite(scalars[kBeta])",
        "test_preconditioner.py::test_a_skipped_step_keeps_v",
    ),
    Mutant(
        "every_chunk_takes_z_of_the_first",
        "cuda/preconditioner.cuh",
        "static_cast<const V*>(list.data[3][t]) + chunk.begin",
        "static_cast<const V*>(list.data[3][t])",
        "test_preconditioner.py::test_long_tensors",
    ),
    Mutant(
        "products_are_rounded_before_they_are_added",
        "cuda/preconditioner.cuh",
        "b * static_cast<double>(new_u.v[k])",
        "r_k * new_u.v[k]",
        "test_preconditioner.py::test_long_tensors",
    ),
    Mutant(
        "decay_is_rounded_before_it_is_subtracted",
        "formulas.h",
        "static_cast<T>(1.0 - decay)",
        "static_cast<T>(1.0) - static_cast<T>(decay)",
        "test_preconditioner.py::test_factors_are_formed_in_double",
    ),
    Mutant(
        "neighbors_of_16_bits_change_places",
        "cuda/types.cuh",
        "y.v[i + 1] = {static_cast<unsigned short>(pair >> 16)};",
        "y.v[i + 1] = y.v[i];",
        "test_numbers.py::test_every_16_bit_number_is_read_and_written_as_torch_does",
    ),
]

SOLVE = [
    Mutant(
        "z_is_damped_as_if_all_of_its_residual_were_in_the_direction",
        "cuda/update.cuh",
        "scalars[kDirectionDamping]",
        "scalars[kLambda]",
        "test_lists.py::test_update_of_long_tensors",
    ),
    Mutant(
        "the_direction_is_damped_by_all_of_lambda",
        "formulas.h",
        "uu + 2.0 * d * zu + d * d * zz",
        "uu + 2.0 * lambd * zu + lambd * lambd * zz",
        "test_solve.py::test_every_combination_of_options",
    ),
    Mutant(
        "beta_stays_as_it_was_where_rho_is_bounded",
        "formulas.h",
        "solve_beta(s, bound)",
        "Step{step.beta, bound, false}",
        "test_solve.py::test_every_combination_of_options",
    ),
    Mutant(
        "averages_are_biased_by_their_start",
        "formulas.h",
        "options.average < most ? options.average : most",
        "options.average",
        "test_solve.py::test_every_combination_of_options",
    ),
    Mutant(
        "averages_are_used_where_the_model_climbs",
        "formulas.h",
        "if (!(quadratic_term > 2.0 * linear_term)) return 1.0;",
        "return 1.0;",
        "test_solve.py::test_every_combination_of_options",
    ),
    Mutant(
        "a_step_is_turned_around_where_the_model_climbs_from_the_start",
        "formulas.h",
        "return linear_term > 0.0 ? linear_term / quadratic_term : 0.0;",
        "return linear_term / quadratic_term;",
        "test_solve.py::test_every_combination_of_options",
    ),
    Mutant(
        "the_prediction_is_of_the_last_solve_alone",
        "formulas.h",
        "const double x1 = used_beta, x2 = -used_rho;",
        "const double x1 = step.beta, x2 = -step.rho;",
        "test_solve.py::test_every_combination_of_options",
    ),
    Mutant(
        "a_step_between_solves_is_bounded_although_it_has_no_room",
        "cuda/solve.cuh",
        "slope, bounded, bounded ?",
        "slope, true, bounded ?",
        "test_solve.py::test_keep_coefficients",
    ),
    Mutant(
        "a_step_between_solves_that_descends_too_far_is_taken_as_it_is",
        "formulas.h",
        "beta * slope > room ?",
        "beta > room ?",
        "test_solve.py::test_keep_coefficients",
    ),
    Mutant(
        "a_step_between_solves_with_an_infinite_loss_is_taken",
        "formulas.h",
        "const double sum = next[kLoss] + slope;",
        "const double sum = slope;",
        "test_solve.py::test_keep_coefficients",
    ),
]

LOSSES = [
    Mutant(
        "a_thread_takes_its_row_before_the_tile_is_there",
        "cuda/cross_entropy.cuh",
        "    __syncthreads();\n    if (exists) {\n      T* const x",
        "    if (exists) {\n      T* const x",
        "test_cross_entropy.py::test_many_rows",
    ),
    Mutant(
        "the_place_in_shared_memory_changes_from_row_to_row",
        "cuda/row_sweeps.cuh",
        "first_stage + rows.room",
        "first_stage + staged",
        "test_cross_entropy.py::test_rows_that_are_misaligned_each_in_its_own_way",
    ),
    Mutant(
        "rows_do_not_take_turns",
        "cuda/row_sweeps.cuh",
        "    turn ^= 1;\n",
        "",
        "test_cross_entropy.py::test_the_same_bits_in_any_order_of_warps_and_blocks",
    ),
    Mutant(
        "a_thread_reads_what_another_has_staged",
        "cuda/row_sweeps.cuh",
        "room - room % size",
        "room",
        "test_cross_entropy.py::test_how_much_of_a_row_is_staged_does_not_matter",
    ),
    Mutant(
        "the_maximum_begins_at_minus_infinity",
        "cuda/row_sweeps.cuh",
        "kLowest = -3.4028234663852886e38f",
        "kLowest = -INFINITY",
        "test_native_losses.py::test_masked_logits",
    ),
    Mutant(
        "rows_begin_at_32_bit_indices",
        "cuda/cross_entropy.cuh",
        "const int64 begin = n * a.rows.classes;\n    products_of_row",
        "const int begin = static_cast<int>(n) * a.rows.classes;\n    products_of_row",
        "test_cross_entropy.py::test_more_than_2_31_elements",
    ),
    Mutant(
        "ignored_targets_count_for_the_mean",
        "cuda/cross_entropy.cuh",
        "y != ignore_index && y >= 0",
        "y >= 0",
        "test_native_losses.py::test_ignored_rows_are_not_even_read",
    ),
]

MUTANTS = LISTS + SOLVE + LOSSES

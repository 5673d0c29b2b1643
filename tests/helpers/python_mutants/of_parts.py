"""Mistakes in batches in parts."""

from __future__ import annotations

from .mutant import PythonMutant

PARTS = [
    PythonMutant(
        "the_masks_of_another_part",
        "replay/replay.py",
        "        self._generators.finish()\n        self._generators.mark()\n",
        "        self._generators.finish()\n",
        "optimizer/test_parts.py::test_parts_run_one_after_the_other_as_one_function_would",
        "published and auto and cross_entropy",
    ),
    PythonMutant(
        "the_statistics_of_another_part",
        "quadratic_model/runs.py",
        "        replays[i + 1].rewind()\n",
        "",
        "optimizer/test_parts.py::test_buffers_that_a_later_part_alone_moves_are_put_back",
        "auto",
    ),
    PythonMutant(
        "every_part_weighs_the_same",
        "batch.py",
        "1.0 if self.is_plain else part.weight()",
        "1.0",
        "optimizer/test_parts.py::test_weights",
        "published and samples",
    ),
    PythonMutant(
        "a_negative_weight_is_taken",
        "batch.py",
        "torch.where(wide < 0, math.nan, wide)",
        "wide",
        "optimizer/test_parts.py::test_a_tensor_that_is_no_weight_skips_the_step",
        "published and 3",
    ),
    PythonMutant(
        "the_loss_of_parts_stays_in_float64",
        "step.py",
        "return terms.loss.to(terms.loss_dtype)",
        "return terms.loss",
        "optimizer/test_parts.py::test_the_loss_of_parts_has_the_dtype_of_one",
        "published and dtype0 and of_loss1",
    ),
    PythonMutant(
        "products_are_those_of_a_sum",
        "quadratic_model/measure.py",
        "torch.cat((loss[None], products_i)), share)",
        "torch.cat((loss[None], products_i)), 1.0)",
        "optimizer/test_parts.py::test_twenty_steps_are_those_of_dense_matrices_of_the_whole",
        "attention and auto",
    ),
    PythonMutant(
        "each_part_is_without_curvature_by_itself",
        "losses/missing_curvature.py",
        "missing = (is_curved == 0) &",
        "missing =",
        "losses/test_missing_curvature.py::test_a_curvature_that_is_there_is_kept_bit_for_bit",
    ),
    PythonMutant(
        "the_direction_of_parts_without_curvature_is_the_gradient",
        "quadratic_model/runs.py",
        "partial(stretch_of, mean) if stretches and not mean.is_plain else None",
        "None",
        "optimizer/test_parts_without_curvature.py::test_a_curvature_is_missing_where_the_whole_has_none",
        "fixed and absolute and not few",  # of two that are solved for the plane is the same
    ),
    PythonMutant(
        "the_graph_of_a_structure_is_kept",
        "outputs.py",
        "_changed(returned, _Forgetting(self._places))",
        "returned",
        "optimizer/test_parts.py::test_the_memory_is_that_of_one_part",
        "published and auto and dictionary",
    ),
    PythonMutant(
        "the_tape_of_the_last_part_is_kept",
        "quadratic_model/runs.py",
        "        last.release()  # before another part runs\n",
        "        pass\n",
        "optimizer/test_parts.py::test_the_memory_is_that_of_one_part",
        "published and auto and tensor",
    ),
]

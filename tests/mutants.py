"""Small faults, each of which some test must find: the tests of the tests (``make test-mutants``).

Every fault is put alone into a copy of the tree, the extension is built again where C++ changed, and the tests named
beside it run until one fails. ``python tests/mutants.py [WORDS ...]`` tries those whose names hold all the words;
without words, all. tests/mutants.json keeps what found each. A fault that lives is a test that is missing; one that no
test could find (the program does the same) is replaced by one that can be found.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import native_build

ROOT = Path(__file__).parent.parent
RECORD = Path(__file__).with_suffix(".json")
SOURCES = ("csrc", "kernels", "flowroutes_fast")


class Mutant(NamedTuple):
    """``old`` occurs once in the sources named ``file``, wherever they lie; ``tests``: names of functions, or of
    one and a pytest -k expression.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def mutant(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, file, old, new, tests)


MUTANTS = [
    # csrc: attention weights
    mutant(
        "cpu attention: causal rows see the next key",
        "rows.h",
        "std::min<int64_t>(keys, a.position(i0 + r) + 1)",
        "std::min<int64_t>(keys, a.position(i0 + r) + 2)",
        "test_every_operation_on_every_instruction_set",
    ),
    mutant(
        "cpu attention: the window holds a key less",
        "rows.h",
        "std::max<int64_t>(0, last - a.window) : 0;",
        "std::max<int64_t>(0, last - a.window + 1) : 0;",
        "test_every_operation_on_every_instruction_set",
    ),
    mutant(
        "cpu attention: a window skips a whole panel too many",
        "rows.h",
        "a.position(i0) + 1 - a.window) / NR * NR : 0;",
        "a.position(i0) + 1 - a.window + NR) / NR * NR : 0;",
        "test_every_operation_on_every_instruction_set",
    ),
    mutant(
        "cpu attention: sinks are left out of the sum",
        "rows.h",
        "(a.sinks ? std::exp(a.sinks[head] - high) : 0.f)",
        "0.f",
        "test_every_operation_on_every_instruction_set",
    ),
    mutant(
        "cpu attention: the soft cap comes before the scale",
        "rows.h",
        "std::tanh(row[j] * a.scale / a.softcap)",
        "std::tanh(row[j] / a.softcap) * a.scale",
        "test_every_operation_on_every_instruction_set",
    ),
    mutant(
        "cpu attention: masks of single heads are those of the first",
        "rows.h",
        "a.mask + head * a.mask_head + (i0 + r) * a.mask_query",
        "a.mask + (i0 + r) * a.mask_query",
        "test_attention_layer_recomputes_every_kind_of_attention",
    ),
    # csrc: exact proximities
    mutant(
        "cpu tiles: five rows are four",
        "rows.h",
        "return tile_of<5>",
        "return tile_of<4>",
        "test_every_operation_on_every_instruction_set",
    ),
    mutant(
        "cpu magnitudes: the prefix of channels ends early",
        "rows.h",
        "return end[i * BUCKETS + bucket(i, a)];",
        "return end[i * BUCKETS + bucket(i, 0.5f * a)];",
        "test_every_operation_on_every_instruction_set",
    ),
    mutant(
        "cpu attention: overshoot is taken off once",
        "dense_cpu.cpp",
        "w0 = vmax(w0 - 2.f * over0, vec{});",
        "w0 = vmax(w0 - over0, vec{});",
        "test_every_operation_on_every_instruction_set",
    ),
    mutant(
        "cpu attention: heads take key-value heads in turn",
        "dense_cpu.cpp",
        "const int64_t kv = h / p.group;",
        "const int64_t kv = h % kv_heads;",
        "test_every_operation_on_every_instruction_set",
    ),
    mutant(
        "cpu attention: the normaliser forgets the other parts",
        "dense_cpu.cpp",
        "double total = p.base ? p.base[i] : 0.f;",
        "double total = 0.f;",
        "test_every_operation_on_every_instruction_set",
    ),
    mutant(
        "cpu attention: heads' sums are not divided",
        "dense_cpu.cpp",
        "by_head[h] *= scale;",
        "by_head[h] *= 1.f;",
        "test_every_operation_on_every_instruction_set",
    ),
    mutant(
        "cpu attention: pairs at the floor are listed",
        "dense_cpu.cpp",
        "mask(load(&pair[from]) * scale > splat(p.floor))",
        "mask(load(&pair[from]) * scale >= splat(p.floor))",
        "test_a_pair_at_the_floor_is_not_listed",
    ),
    mutant(
        "cpu parts: the tail counts |y| once",
        "parts.h",
        "total += std::min(w, 2.f * std::fabs(y[c]) - w);",
        "total += std::min(w, std::fabs(y[c]) - w);",
        "test_every_operation_on_every_instruction_set",
    ),
    mutant(
        "cpu parts: negative sums are kept",
        "parts.h",
        "return total < 0.f ? 0.f : total;  // NaN",
        "return total;  // NaN",
        "test_every_operation_on_every_instruction_set",
    ),
    mutant(
        "cpu parts: NaN becomes nothing",
        "parts.h",
        "return total < 0.f ? 0.f : total;  // NaN",
        "return total > 0.f ? total : 0.f;  // NaN",
        "test_not_a_number_stays_one",
    ),
    mutant(
        "cpu neurons: the sign of zero is lost",
        "rank1_cpu.cpp",
        "(std::signbit(y[c]) ? -z : z)",
        "(y[c] < 0.f ? -z : z)",
        "test_every_operation_on_every_instruction_set and rank1",
    ),
    mutant(
        "cpu kernels: threads= is ignored",
        "rows.h",
        "return asked > 0 ? std::min(asked,",
        "return asked < 0 ? std::min(asked,",
        "test_threads_are_as_many_as_asked",
    ),
    # csrc: certified
    mutant(
        "cpu certified: overshoot is taken off once",
        "certified_block.h",
        "w - 2.f * (over[0] + over[1] + over[2] + over[3])",
        "w - (over[0] + over[1] + over[2] + over[3])",
        "test_intervals_hold_the_truth",
    ),
    mutant(
        "cpu certified: wide channels are not looked at",
        "certified_block.h",
        "for (int x = 0; x < WIDE; ++x) {  // the few",
        "for (int x = 0; x < 0; ++x) {  // the few",
        "test_intervals_hold_the_truth",
    ),
    mutant(
        "cpu certified: the gate is missing",
        "certified_block.h",
        "gated[c] = value[c] * gate[c];",
        "gated[c] = value[c];",
        "test_every_operation_on_every_instruction_set",
    ),
    mutant(
        "cpu certified: the row scale is missing",
        "certified_block.h",
        "*= p.row_scale[i0 + r];",
        "*= 1.f;",
        "test_every_operation_on_every_instruction_set",
    ),
    mutant(
        "cpu certified: the lower end subtracts half",
        "certified_block.h",
        "x.w[c] - 2.f * x.t[c] * slopes[2 * h + c]",
        "x.w[c] - x.t[c] * slopes[2 * h + c]",
        "test_the_lower_end_where_all_signs_agree",
    ),
    mutant(
        "cpu certified: the upper end forgets a class",
        "certified_block.h",
        "high += x.w[0] + x.w[1] + x.w[2];",
        "high += x.w[0] + x.w[1];",
        "test_intervals_hold_the_truth",
    ),
    mutant(
        "cpu certified: lengths of denormals vanish",
        "certified_layer.h",
        "bounded(most < 1e-15f ? most * std::sqrt(float(n)) : std::sqrt(total))",
        "bounded(std::sqrt(total))",
        "test_edge_cases and tiny",
    ),
    mutant(
        "cpu certified: values of the wrong key-value head",
        "pairs_cpu.cpp",
        "const float* v = p.v + h / p.group * p.v_head",
        "const float* v = p.v + h % (p.heads / p.group) * p.v_head",
        "test_every_operation_on_every_instruction_set and pairs",
    ),
    mutant(
        "cpu certified: ends of an interval are swapped at thresholds",
        "certified_block.h",
        "a = p.thresholds[n] * low, b = p.thresholds[n] * high;",
        "a = p.thresholds[n] * high, b = p.thresholds[n] * low;",
        "test_nothing_is_ambiguous_at_the_thresholds_asked_for",
    ),
    mutant(
        "cpu certified: the tolerance is a hundred times as wide",
        "certified_cpu.cpp",
        "!(high - low > tolerance * (high + low))",
        "!(high - low > 100.f * tolerance * (high + low))",
        "test_the_normaliser_is_known_to_the_tolerance",
    ),
    mutant(
        "cpu certified: tolerances of rows are ignored",
        "certified_cpu.cpp",
        "p.tolerances ? p.tolerances[x.i0 + r] : p.tolerance",
        "p.tolerance",
        "test_tolerance_per_row",
    ),
    mutant(
        "cpu certified: a full list is no reason to evaluate all",
        "certified_cpu.cpp",
        "const bool crowded = p.capacity > 0 && ",
        "const bool crowded = p.capacity < 0 && ",
        "test_a_full_candidate_buffer_falls_back_to_exact",
    ),
    mutant(
        "cpu certified: the floor is one of the upper end",
        "certified_cpu.cpp",
        "const float above = p.floor * p.low[i];",
        "const float above = p.floor * p.high[i];",
        "test_pairs_that_may_reach_the_floor_are_listed",
    ),
    mutant(
        "cpu certified: channels within a step of u are left out",
        "certified_block.h",
        "(flip(gather(u, channel + c), of) + 1.f) * a > vabs(of)",
        "(flip(gather(u, channel + c), of) - 1.f) * a > vabs(of)",
        "test_channels_told_apart_by_u_in_steps",
    ),
    mutant(
        "cpu certified: what other heads may add is not said",
        "certified_cpu.cpp",
        "open > 1e-6f * row[key]",
        "open > 1e6f * row[key]",
        "test_intervals_hold_the_truth",
    ),
    mutant(
        "cpu signed: negative shares are not listed",
        "certified_cpu.cpp",
        "(vabs(f) > least) |",
        "(f > least) |",
        "test_backends_agree_on_a_signed_and_on_a_bounded_layer and signed",
    ),
    mutant(
        "cpu bounds: sums of pairs have no cut",
        "bound_cpu.cpp",
        "(b.pair_cut && x.pair[r * x.stride + key] > b.pair_cut[i0 + r])",
        "false",
        "test_bound_candidates_and_pairs",
    ),
    # csrc: conservation
    mutant(
        "cpu conservation: attention weights are not compared",
        "conservation_cpu.cpp",
        "errors[0] = weights_error(p);",
        "errors[0] = 0.f;",
        "test_the_native_kernel_says_the_same",
    ),
    mutant(
        "cpu conservation: NaN is no error",
        "conservation_cpu.cpp",
        "return b > a || b != b ? b : a;",
        "return b > a ? b : a;",
        "test_the_native_kernel_says_the_same",
    ),
    mutant(
        "cpu conservation: the bias is scaled with the row",
        "conservation_cpu.cpp",
        "p.bias_is_scaled ?",
        "true ?",
        "test_biases_behind_a_norm_by_the_native_kernel",
    ),
    # csrc: CUDA
    mutant(
        "cuda: a term counts |y| once",
        "tiles_cuda.h",
        "fmaf(2.f, fabsf(y), -w)",
        "fmaf(1.f, fabsf(y), -w)",
        "test_emulated_parts",
    ),
    mutant(
        "cuda pairs: heads take key-value heads in turn",
        "pairs_cuda.h",
        "head / p.group * p.v_head",
        "head % (p.heads / p.group) * p.v_head",
        "test_emulated_pairs",
    ),
    mutant(
        "cuda pairs: the gate is one of the first head",
        "pairs_cuda.h",
        "+ head * p.gate_head + column * EACH",
        "+ column * EACH",
        "test_emulated_pairs_gated_ordered_and_split",
    ),
    mutant(
        "cuda pairs: what 16 bits of a gated value lose is lost",
        "pairs_cuda.h",
        "static_cast<T>(product - static_cast<float>(high[i]))",
        "static_cast<T>(0.f)",
        "test_emulated_pairs_gated_ordered_and_split",
    ),
    mutant(
        "cuda pairs: the first share of the width is lost",
        "pairs_cuda.h",
        "for (int s = 0; s < p.splits; ++s) total +=",
        "for (int s = 1; s < p.splits; ++s) total +=",
        "test_emulated_pairs_gated_ordered_and_split",
    ),
    mutant(
        "cuda: rows past the end are read",
        "tiles_cuda.h",
        "valid = row < rows && from + byte",
        "valid = from + byte",
        "test_emulated_dense",
        "test_emulated_pairs",
    ),
    mutant(
        "cuda dense: the causal edge is one key late",
        "dense_cuda.h",
        "!(p.causal && j + 16 * n > i + 8 * r + offset)",
        "!(p.causal && j + 16 * n > i + 8 * r + offset + 1)",
        "test_emulated_dense",
    ),
    mutant(
        "cuda parts: one part for all rows is not",
        "parts_cuda.h",
        "p.part + n % p.part_rows * p.d_model",
        "p.part + n * p.d_model",
        "test_emulated_parts",
    ),
    # kernels
    mutant("triton: the window holds a key more", "common.py", "(age < window)", "(age <= window)", "test_rows"),
    mutant(
        "triton: the soft cap is of scores not divided",
        "common.py",
        "softcap * tanh(scores / softcap)",
        "softcap * tanh(scores)",
        "test_rows",
    ),
    mutant(
        "triton: a term counts |y| once",
        "common.py",
        "tl.minimum(w, 2 * tl.abs(y) - w)",
        "tl.minimum(w, tl.abs(y) - w)",
        "test_parts",
    ),
    mutant(
        "triton dense: the row scale is missing",
        "dense.py",
        "weights(scores, lse[:, None]) * row_scale[:, None]",
        "weights(scores, lse[:, None])",
        "test_dense",
    ),
    mutant(
        "triton rows: sinks are left out of the sum",
        "attention.py",
        "total = total * decay + tl.exp(sink - new_high)",
        "total = total * decay",
        "test_rows",
    ),
    mutant(
        "triton bounds: slack 0",
        "bound.py",
        "flow += (error * (v_length + v_error) + length * v_error)[:, None]",
        "flow += 0.0 * error[:, None]",
        "test_bounds_hold",
    ),
    mutant(
        "triton bounds: no slack for what values lose",
        "bound.py",
        "(error * (v_length + v_error) + length * v_error)",
        "(error * v_length)",
        "test_bounds_hold",
    ),
    mutant(
        "triton bounds: no slack for what gradients lose",
        "bound.py",
        "(error * (v_length + v_error) + length * v_error)",
        "(length * v_error)",
        "test_bounds_hold",
    ),
    mutant(
        "triton gradient: no slack for its own sum",
        "gradient.py",
        "+ error / scale + product_error * length",
        "+ product_error * length",
        "test_a_gradient_that_cancels_says_how_far_it_may_be_off",
    ),
    mutant(
        "triton bounds: what is listed stays in the sum",
        "bound.py",
        "rest += tl.sum(tl.where(above, 0.0, b), 1)",
        "rest += tl.sum(b, 1)",
        "test_bounds",
    ),
    mutant(
        "triton signed: the other side is the same side",
        "gradient.py",
        "Halves(-self.half,",
        "Halves(self.half,",
        "test_signed_triton_through_trace",
    ),
    mutant(
        "triton pairs: the row scale is missing",
        "pairs.py",
        "alpha *= tl.load(p_row_scale",
        "alpha += 0 * tl.load(p_row_scale",
        "test_pairs",
    ),
    mutant(
        "triton pairs: heads take key-value heads in turn",
        "pairs.py",
        "i_kv = i_head // group",
        "i_kv = i_head % (n_head // group)",
        "test_pairs",
    ),
    mutant(
        "triton decisions: a sum at the upper end is not open",
        "decide.py",
        "& (known <= threshold * high))\n    unclear = first",
        "& (known < threshold * low))\n    unclear = first",
        "test_decisions",
    ),
    # flowroutes_fast
    mutant(
        "reference: the sign of zero is lost",
        "reference.py",
        "sign = torch.copysign(torch.ones_like(whole), whole)\n        w =",
        "sign = torch.sign(whole)\n        w =",
        "test_edge_cases_of_a_pattern and reference",
    ),
    mutant(
        "reference: the window holds a key more",
        "reference.py",
        "(age >= window)",
        "(age > window)",
        "test_attention_layer_recomputes_every_kind_of_attention",
    ),
    mutant(
        "reference: pairs take the first gate",
        "reference.py",
        "v = v * gate[i, h]",
        "v = v * gate[i, 0]",
        "test_bound_candidates_and_pairs and gate",
    ),
    mutant(
        "bounds: the slack asked for is not added",
        "bound.py",
        "return (flow + extra).clamp_min(0)",
        "return flow.clamp_min(0)",
        "test_low_precision_needs_slack_and_has_it",
    ),
    mutant(
        "rounds: the floor is one of the upper end",
        "certified_rounds.py",
        "(sums[first] > self.floor * low[query])",
        "(sums[first] > self.floor * high[query])",
        "test_pairs_that_may_reach_the_floor_are_listed",
    ),
    mutant(
        "rounds: ends of an interval are swapped at thresholds",
        "certified_rounds.py",
        "(values > threshold * low[rows]) & (values <= threshold * high[rows])",
        "(values > threshold * high[rows]) & (values <= threshold * low[rows])",
        "test_nothing_is_ambiguous_at_the_thresholds_asked_for",
    ),
    mutant(
        "passes: ends of an interval are swapped at thresholds",
        "certified_gpu.py",
        "torch.stack([low, high])  # [threshold",
        "torch.stack([high, low])  # [threshold",
        "test_a_part_at_a_threshold_is_settled",
    ),
    mutant(
        "layer kernels: threads= is not handed on",
        "attention.py",
        "w_row=n_head * d_v,\n        threads=threads",
        "w_row=n_head * d_v,\n        threads=0",
        "test_threads_argument_is_taken",
    ),
    mutant(
        "neurons: the tolerance is ten times as wide",
        "neurons.py",
        "(high - low > tolerance * (high + low))",
        "(high - low > 10 * tolerance * (high + low))",
        "test_neurons_are_known_to_the_tolerance",
    ),
    mutant(
        "neurons: the floor is one of the upper end",
        "neurons.py",
        "at = (proximities > (floor * low)[:, None]).nonzero()",
        "at = (proximities > (floor * high)[:, None]).nonzero()",
        "test_neurons_are_known_to_the_tolerance",
    ),
    mutant(
        "importances: biases take key-value heads in turn",
        "importances.py",
        "value_bias.repeat_interleave(w_o.shape[0] // value.shape[0], 0)",
        "value_bias.repeat(w_o.shape[0] // value.shape[0], 1)",
        "test_parts_add_up_to_the_states",
    ),
    mutant(
        "importances: the upper end of a head is too low",
        "importances.py",
        "found.head_high + (low - found.head_low).clamp_min(0)",
        "found.head_high + (high - found.head_low).clamp_min(0)",
        "test_certified_routes_are_exact_routes and llama",
    ),
    mutant(
        "importances: a norm's scale is missing on biases",
        "importances.py",
        "block.post_norm is not None and layer.row_scale is not None:\n                constant",
        "block.post_norm is None and layer.row_scale is not None:\n                constant",
        "test_parts_add_up_at_every_node",
    ),
    mutant(
        "neurons: any sum is the FFN's",
        "importances.py",
        "layer.ffn_out[-1].float()) > 0.05:",
        "layer.ffn_out[-1].float()) > 5:",
        "test_neurons_that_are_not_the_ffn_are_refused",
    ),
    mutant(
        "conservation: float32 may miss a hundred times as much",
        "conservation.py",
        "torch.float32: 1e-5,",
        "torch.float32: 1e-3,",
        "test_small_changes_are_refused",
    ),
    mutant(
        "conservation: float16 may miss a hundred times as much",
        "conservation.py",
        "torch.float16: 2e-3,",
        "torch.float16: 2e-1,",
        "test_a_louder_attention_shows_beside_outliers",
    ),
    mutant(
        "conservation: nothing is judged at the end",
        "conservation.py",
        'has {self.layers}")\n        self.judge()',
        'has {self.layers}")',
        "test_a_plain_pass_is_judged_at_its_end",
    ),
    mutant(
        "conservation: what enters a layer is not compared",
        "conservation.py",
        "before = self.left.pop(sequence, None)",
        "before = None",
        "test_steering_between_layers_is_refused",
    ),
    mutant(
        "conservation: channels are not told apart",
        "conservation.py",
        "SMALLEST = 1e-3",
        "SMALLEST = 1.0",
        "test_a_louder_attention_shows_beside_outliers",
    ),
    mutant(
        "capture: the window is not read",
        "hooks.py",
        'int(options.get("sliding_window") or 0) if mask',
        "0 if mask",
        "test_windows_without_a_mask",
    ),
    mutant(
        "capture: the soft cap is not read",
        "hooks.py",
        'softcap = float(options.get("softcap") or 0.0)',
        "softcap = 0.0",
        "test_parts_add_up_at_every_node and gemma2",
    ),
    mutant(
        "capture: sinks are not read",
        "hooks.py",
        'sinks = options.get("s_aux")',
        "sinks = None",
        "test_parts_add_up_at_every_node and gpt_oss",
    ),
    mutant(
        "trace: ends of an interval are swapped",
        "trace.py",
        "& (high > 0), middle / high, 1.0)",
        "& (high > 0), middle / low, 1.0)",
        "test_open_decisions_are_settled_or_refused",
        "test_certificate_edges_and_refusals",
    ),
    mutant(
        "trace: another model refines open rows",
        "trace.py",
        "if not bool(((exact >= low * (1 - CHANGED))",
        "if False and not bool(((exact >= low * (1 - CHANGED))",
        "test_a_changed_model_refines_nothing",
    ),
    mutant(
        "routes: open rows are not asked for",
        "extract.py",
        'if trace.precision == "certified" and len(undecided',
        'if trace.precision == "other" and len(undecided',
        "test_open_decisions_are_settled_or_refused",
    ),
    mutant(
        "few rows: a parallel block's FFN is no part of its sum",
        "few_rows.h",
        "c.n_others = p.parallel ? 4 : 3;",
        "c.n_others = 3;",
        "test_every_operation_on_every_instruction_set",
    ),
    mutant(
        "few rows: the FFN takes the residual's share",
        "few_rows.h",
        "*row++ = share(ffn, total);",
        "*row++ = share(past, total);",
        "test_every_operation_on_every_instruction_set",
    ),
    mutant(
        "routes: a bias at the threshold leaves no row open",
        "extract.py",
        "check(everyone, bias, bias)",
        "(everyone, bias, bias)",
        "test_a_bias_at_the_threshold_leaves_a_row_open",
    ),
    mutant(
        "routes: sub-edges at the threshold are followed",
        "extract.py",
        "keep = (np.abs(value) > threshold)",
        "keep = (np.abs(value) >= threshold)",
        "test_what_is_at_the_threshold_is_no_edge",
    ),
    mutant(
        "routes: an FFN at the threshold is followed",
        "extract.py",
        "kept = [np.abs(part.importance) > threshold",
        "kept = [np.abs(part.importance) >= threshold",
        "test_what_is_at_the_threshold_is_no_edge",
    ),
    mutant(
        "routes: survivors are not renormalised",
        "extract.py",
        "head, value / total[row])",
        "head, value)",
        "test_extraction_is_algorithm_1",
    ),
    mutant(
        "routes: biases take no part in renormalisation",
        "extract.py",
        "minlength=len(active)) + biases",
        "minlength=len(active))",
        "test_survivors_are_divided_by_their_sum",
    ),
    mutant(
        "flow: other heads carry all they may",
        "flow.py",
        '(trace.measure != "signed"), value / 2, value)',
        '(trace.measure != "signed"), value, value)',
        "test_other_heads_of_a_pair_carry_half_of_what_they_may",
    ),
    mutant(
        "flow: a node that nothing enters loses its mass",
        "flow.py",
        "below = np.where(total > 0, 0.0, mass)",
        "below = np.zeros_like(mass)",
        "test_mass_at_a_node_that_nothing_enters_goes_down",
    ),
]


def sources(root: Path = ROOT) -> list[Path]:
    """C++, CUDA and Python files that faults are put into."""
    link = root / "flowroutes_fast/kernels"
    files = (
        path for folder in SOURCES for path in (root / folder).rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".py")
    )
    return sorted(path for path in files if link not in path.parents)


def home(fault: Mutant, root: Path = ROOT) -> Path:
    """The one file that holds the fault's text; ``LookupError`` where none or several do, or one does more than
    once.
    """
    named = [path for path in sources(root) if path.name == fault.file]
    found = [(path, count) for path in named if (count := path.read_text(encoding="utf-8").count(fault.old))]
    if [count for _, count in found] != [1]:
        elsewhere = [
            str(path.relative_to(root)) for path in sources(root) if fault.old in path.read_text(encoding="utf-8")
        ]
        raise LookupError(
            f"{fault.name!r}: its text must occur once in {fault.file}, and is in {elsewhere or 'no file'}"
        )
    return found[0][0]


def files_of(function: str, root: Path = ROOT) -> list[Path]:
    """Where tests of this name are defined; ``LookupError`` where there are none."""
    pattern = re.compile(rf"^\s*def {function}\(", re.MULTILINE)
    found = [
        path for path in sorted((root / "tests").rglob("test_*.py")) if pattern.search(path.read_text(encoding="utf-8"))
    ]
    if not found:
        raise LookupError(f"there is no test {function}")
    return found


def _built(folder: str, names: list[str]) -> set[str]:
    """What is no source, for shutil.copytree: also kernels/ where the package links to it."""
    link = {"kernels"} & set(names) if Path(folder) == ROOT / "flowroutes_fast" else set()
    return link | {name for name in names if name == "__pycache__" or name.endswith(".so")}


class Tree:
    """A copy of the working tree, with an extension built quickly: one instruction set, objects kept by what they
    are made of.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self.objects = folder / "tree", folder / "objects"
        self.objects.mkdir()
        for name in (*SOURCES, "tests"):
            shutil.copytree(ROOT / name, self.root / name, ignore=_built)
        shutil.copy(ROOT / "pyproject.toml", self.root)
        (self.root / "flowroutes_fast/kernels").symlink_to("../kernels")
        self.extension = self.root / f"flowroutes_fast/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
        self.build()
        self.clean = self.extension.read_bytes()

    def build(self) -> None:
        """``CalledProcessError`` where it does not compile."""
        self.extension.unlink(missing_ok=True)
        native_build.build(self.root / "csrc", self.extension, self.objects)

    def run(self, tests: list[str]) -> str | None:
        """The first of these tests that fails, or None; ``RuntimeError`` where they could not be run."""
        files: dict[Path, list[str]] = {}
        for test in tests:
            for file in files_of(test.split(" and ")[0], self.root):
                files.setdefault(file, []).append(f"({test})")
        plain = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CI": "",
        }
        for file, chosen in files.items():
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-x",
                "-rf",
                "-p",
                "no:cacheprovider",
                "--hypothesis-seed=0",
                str(file),
            ]
            command += ["-k", " or ".join(chosen)]
            interpreted = "IN_CHILD" in file.read_text(encoding="utf-8")  # then here, not in a child process
            environment = plain | ({"TRITON_INTERPRET": "1"} if interpreted else {})
            done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=900)
            shutil.rmtree(self.root / ".hypothesis", ignore_errors=True)
            if done.returncode == 1:
                failed = re.search(r"^FAILED (.+?)(?: - |$)", done.stdout, re.MULTILINE)
                return failed[1] if failed else str(file)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return None

    def try_out(self, fault: Mutant) -> str | None:
        """What found the fault, or None."""
        path = home(fault, self.root)
        text, native = path.read_text(encoding="utf-8"), path.suffix in (".cpp", ".h") and "cuda" not in path.name
        try:
            path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
            if native:
                self.build()
            return self.run(list(fault.tests))
        finally:
            path.write_text(text, encoding="utf-8")
            if native:
                self.extension.unlink(missing_ok=True)
                self.extension.write_bytes(self.clean)


def record(found: dict[str, str | None]) -> None:
    """Write what found each fault of the list; those not tried now keep what is written of them."""
    before = json.loads(RECORD.read_text(encoding="utf-8"))["found_by"] if RECORD.exists() else {}
    known = before | found
    by = {fault.name: known[fault.name] for fault in MUTANTS if fault.name in known}
    written = {"faults": len(MUTANTS), "found": sum(map(bool, by.values())), "found_by": by}
    RECORD.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Put faults into a copy of the tree and see which tests find them.")
    parser.add_argument("words", nargs="*", help="only faults whose names hold all of these")
    parser.add_argument("--new", action="store_true", help="only faults that no test is recorded for")
    given = parser.parse_args()
    known = json.loads(RECORD.read_text(encoding="utf-8"))["found_by"] if given.new and RECORD.exists() else {}
    chosen = [
        fault for fault in MUTANTS if all(word in fault.name for word in given.words) and not known.get(fault.name)
    ]
    for fault in chosen:
        home(fault)
    found: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Tree(Path(folder))
        if wrong := tree.run(sorted({test for fault in chosen for test in fault.tests})):
            raise RuntimeError(f"{wrong} fails without any fault")
        for fault in chosen:
            start = time.perf_counter()
            found[fault.name] = tree.try_out(fault)
            print(f"{time.perf_counter() - start:5.0f} s  {fault.name}: {found[fault.name] or 'LIVES'}", flush=True)
            record(found)
    killed = sum(map(bool, found.values()))
    print(f"{killed} of {len(found)} faults were found")
    return int(killed < len(found))


if __name__ == "__main__":
    sys.exit(main())

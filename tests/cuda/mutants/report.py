"""Bugs in the CUDA kernels' reports of mean logits and entropies."""

from __future__ import annotations

from mutants import FORWARD, Mutant

REPORT = "cuda/row_report.cuh"

REPORT_MUTANTS = (
    Mutant(
        "no barrier before the reports of the warps are read",
        REPORT,
        "    report_sums[3 * warp + 2] = report.sum_exp_z;\n  }\n  __syncthreads();\n",
        "    report_sums[3 * warp + 2] = report.sum_exp_z;\n  }\n",
        "report",
        "tsan",
    ),
    Mutant(
        "the report not moved when the maximum rises",
        FORWARD,
        "    if (largest > sum.max) move_report(report, sum, largest);\n",
        "",
        "report",
    ),
    Mutant(
        "the report of an edge not moved when the maximum rises",
        FORWARD,
        "      if (z > sum.max) move_report(report, sum, z);\n",
        "",
        "report",
    ),
    Mutant(
        "an entropy of NaN where a logit is -inf",
        REPORT,
        "term * larger(std::numeric_limits<Scalar>::lowest(), distance);",
        "term * distance;",
        "report",
    ),
    Mutant(
        "an empty sum moved to NaN",
        REPORT,
        "      scale == 0.0 ? 0.0 : scale * (",
        "      scale * (",
        "report",
    ),
    Mutant(
        "the mean without what was subtracted",
        REPORT,
        "static_cast<double>(count) * static_cast<double>(reference) +",
        "0.0 * static_cast<double>(reference) +",
        "report",
    ),
    Mutant(
        "masked rows read without being asked for",
        REPORT,
        "  if (!is_masked || !args.all_positions) {",
        "  if (!is_masked) {",
        "report",
    ),
    Mutant(
        "the report of the parts before forgotten",
        FORWARD,
        "        report_before = {load(args.mean_logit + row), load(args.entropy + row)};\n",
        "",
        "report",
    ),
    Mutant(
        "the mean of a masked row without the parts before",
        REPORT,
        "  if (args.continues) report.sum_z += load(args.mean_logit + row);\n",
        "",
        "report",
    ),
)

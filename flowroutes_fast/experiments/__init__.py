"""The paper's experiments with routes: ablation, faithfulness, patching, task templates."""

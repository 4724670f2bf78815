"""The plan: where every element of the model lies, as pure values without torch.distributed."""

from shardline.plan.plan import (
    ALIGNMENT,
    BucketPlan,
    Entry,
    Fragment,
    ModuleSpec,
    ParamSpec,
    Plan,
    Run,
    UnitPlan,
    make_plan,
    runs_fit,
)

__all__ = [
    "ALIGNMENT",
    "BucketPlan",
    "Entry",
    "Fragment",
    "ModuleSpec",
    "ParamSpec",
    "Plan",
    "Run",
    "UnitPlan",
    "make_plan",
    "runs_fit",
]

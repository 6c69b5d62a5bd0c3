"""A custom model family: SD3 with another default guidance scale. docs/models.md explains families.

trl-tpgrpo train --config examples/recipes/testbed.yaml --guidance_scale null \
    --policy_class examples/guided_policy.py:Guided
"""

from trl_tpgrpo.policies.sd3 import SD3Policy


class Guided(SD3Policy):
    """SD3 with a default `guidance_scale` of 2.0 instead of 4.5."""

    default_guidance = {"guidance_scale": 2.0}

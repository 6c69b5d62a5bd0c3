"""A model family of one's own: SD3's, with another default of guidance. docs/models.md explains families.

trl-tpgrpo train --config examples/recipes/testbed.yaml --guidance_scale null \
    --policy_class examples/guided_policy.py:Guided
"""

from trl_tpgrpo.policies.sd3 import SD3Policy


class Guided(SD3Policy):
    """SD3, guided by 2 where no `guidance_scale` is set, and not by 4.5."""

    default_guidance = {"guidance_scale": 2.0}

"""Each family's tiny pipeline and the settings that it is trained with in tests."""

from tiny import tiny_flux, tiny_sd3
from tiny_flux2 import tiny_chroma, tiny_flux2, tiny_flux2_klein, tiny_krea2
from tiny_qwen import tiny_qwen_image, tiny_z_image


FAMILIES = {
    "sd3": (tiny_sd3, {}),
    "flux": (tiny_flux, {}),
    "qwen_image": (
        tiny_qwen_image,
        {"guidance_scale": None, "negative_prompt": " ", "true_cfg_scale": 2.5, "max_sequence_length": None},
    ),
    "z_image": (tiny_z_image, {"max_sequence_length": None}),
    "flux2-klein": (tiny_flux2_klein, {"max_sequence_length": 24}),
    "flux2": (tiny_flux2, {"max_sequence_length": 48}),
    "krea2": (tiny_krea2, {"max_sequence_length": 16}),
    "chroma": (tiny_chroma, {}),
}

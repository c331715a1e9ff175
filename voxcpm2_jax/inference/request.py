"""TODO inference.request."""

from voxcpm2_jax.config.plain import UserError

MAX_CFG, MAX_STEPS = 10.0, 1000


def check_settings(
    *, text, prompt_wav_path=None, prompt_text=None, cfg_value=2.0, inference_timesteps=10, min_len=2, max_len=4096,
    retry_badcase_max_times=3, retry_badcase_ratio_threshold=6.0,
):  # fmt: skip
    """Refuses what no model could do with these settings, before anything is loaded.

    Raises:
        UserError: in one line what is wrong.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"text must not be empty or only spaces, got {text!r}")
    if (prompt_wav_path is None) != (prompt_text is None):
        have, lack = ("audio", "text") if prompt_text is None else ("text", "audio")
        raise UserError(f"a prompt needs its audio and its text; got prompt {have} without prompt {lack}")
    if not 0 <= cfg_value <= MAX_CFG:
        raise UserError(f"cfg_value must lie between 0 and {MAX_CFG:g} (useful: 1.5 to 3), got {cfg_value}")
    if not 1 <= inference_timesteps <= MAX_STEPS:
        raise UserError(f"inference_timesteps must lie between 1 and {MAX_STEPS}, got {inference_timesteps}")
    if min_len < 0 or max_len < 1 or min_len > max_len:
        raise UserError(f"min_len and max_len must satisfy 0 <= min_len <= max_len, max_len >= 1; got {min_len} and {max_len}")
    for name, value in (("max_times", retry_badcase_max_times), ("ratio_threshold", retry_badcase_ratio_threshold)):
        if not value > 0:
            raise UserError(f"retry_badcase_{name} must be over 0, got {value}")

"""Other architectures that are mistaken for Wav2Vec 2.0, known by the names of their tensors."""

import re
from collections.abc import Iterable
from pathlib import Path

from weights import KNOWN

OTHERS = {
    "data2vec": r"(^|\.)data2vec_audio\.|pos_conv_embed\.layers\.|pos_conv\.\d+\.0\.",
    "UniSpeech-SAT": r"(^|\.)unispeech_sat\.",
    "UniSpeech": r"(^|\.)unispeech\.",
    "SEW": r"(^|\.)sew(_d)?\.|(^|\.)feature_projection\.(weight|bias)$|encoder\.upsample\.",
    "w2v-BERT": r"(^|\.)wav2vec2_bert\.|distance_embedding",
    "Conformer": r"conv_module|linear_pos|pos_bias_u",
    "Whisper": r"encoder\.(conv1|embed_positions)\.",
}


def refusal(keys: Iterable[str], path: Path, what: str) -> ValueError:
    """What to raise of a file: the architecture that one of these keys gives away, else `what`."""
    for name, telling in OTHERS.items():
        if key := next((key for key in keys if re.search(telling, key)), None):
            return ValueError(f"{path}: is a {name} checkpoint (it has {key}); expected {', '.join(KNOWN)}")
    return ValueError(f"{path}: {what}")

"""TRL's GKD, as a baseline on the same prompts."""

import logging

from trl.experimental.gkd import GKDTrainer


logging.getLogger("trl.experimental.gkd").setLevel(logging.ERROR)  # it advises another trainer than the baseline
# TRL passes it beside a generation config, which transformers deprecates and no setting avoids
logging.getLogger("transformers.generation.utils").addFilter(
    lambda record: "return_dict_in_generate" not in record.getMessage()
)


class SampledGKD(GKDTrainer):
    """TRL's own, except that its loss is the mean over what was sampled, because the data set has no completions."""

    def _get_num_items_in_batch(self, batch_samples, device):
        return None

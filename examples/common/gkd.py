"""TRL's GKD, as a baseline on the same prompts."""

import logging

from trl.experimental.gkd import GKDConfig, GKDTrainer

from trl_ext.tropd.prompts import PromptCollator


logging.getLogger("trl.experimental.gkd").setLevel(logging.ERROR)  # it advises another trainer than the baseline
# TRL passes it beside a generation config, which transformers deprecates and no setting avoids
logging.getLogger("transformers.generation.utils").addFilter(
    lambda record: "return_dict_in_generate" not in record.getMessage()
)


class SampledGKD(GKDTrainer):
    """
    TRL's own on datasets without completions: its collator would ask for `messages`, and its loss be divided by the
    dataset's number of completion tokens. Here the loss is the mean over the tokens that were sampled.
    """

    def __init__(self, model, teacher, args: GKDConfig, processing_class, **arguments):
        collator = PromptCollator(processing_class, args.max_length, completions=args.lmbda < 1)
        super().__init__(model, teacher, args, collator, processing_class=processing_class, **arguments)

    def _get_num_items_in_batch(self, batch_samples, device):
        return None

"""A tokenizer of a few words, as transformers writes it beside the weights of a site."""

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors


def tokenizer_of(*words: str) -> transformers.PreTrainedTokenizerFast:
    """Padding is token 0, the end of a text 1, another word 2, and then these words."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *words))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )

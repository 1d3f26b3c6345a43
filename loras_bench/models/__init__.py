"""Models and tokenizers of the GPT-2, BERT, RoBERTa and Llama families."""

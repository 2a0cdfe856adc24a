"""Baichuan2-7B as a plain Llama."""

from .conversion import PREFIX, convert, converted, is_baichuan, llama_config

__all__ = ["PREFIX", "convert", "converted", "is_baichuan", "llama_config"]

"""Character ranges, for use inside [ ] of a regular expression, of scripts without spaces between words. Word counts treat
each of their characters as a word."""

HAN = r"\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0002ffff"  # Chinese, and part of Japanese
OTHER_UNSPACED = r"\u3040-\u30ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # kana, Thai and Lao, Burmese, Khmer

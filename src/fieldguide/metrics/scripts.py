"""Scripts whose languages put no blanks between words, as contents of a regular expression's [ ]: what counts words must count
their characters instead."""

HAN = r"\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0002ffff"  # Chinese, and part of Japanese
OTHER_UNSPACED = r"\u3040-\u30ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # kana, Thai and Lao, Burmese, Khmer

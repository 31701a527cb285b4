from videos import encode_sample

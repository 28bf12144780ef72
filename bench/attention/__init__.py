"""The task `attention`: do attention distributions tell how sensitive a block is, and how easily a model is fooled?"""

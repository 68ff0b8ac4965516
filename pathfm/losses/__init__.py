"""Losses of pretraining as pure functions of whole batches; whoever calls them has gathered.

fp32 in, fp32 out, whatever autocast says around them.
"""

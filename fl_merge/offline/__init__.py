"""Merging models in files: recipes that name their models, mergekit's among them.

config      what a recipe says, as plain data
catalogue   mergekit's methods in ours, a row each
models      the folders and files that are read
layout      which tensors the merged model has and of which each is made
resolve     the settings of each tensor
plan        all of it as one merge method and its cohort
run, output the folder that is written
"""

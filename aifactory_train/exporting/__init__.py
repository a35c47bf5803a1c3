"""Exports: written shard by shard, checked by a fresh process, described by a model card."""

"""opensora/datasets/bucket.py and `apply` of sampler.py: the frames that a row is bucketed by."""

from opensora.datasets.datasets import map_target_fps


def get_bucket_id(data, fps_max):
    """The number of frames that is compared with those of the buckets; theirs gives the bucket."""
    _, sampling_interval = map_target_fps(data["fps"], fps_max)
    return data["num_frames"] // sampling_interval

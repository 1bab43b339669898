"""opensora/datasets/datasets.py and what it takes of utils.py."""

import math

import numpy as np
import pandas as pd
import torch

from opensora.registry import DATASETS


def map_target_fps(fps, max_fps):
    if math.isnan(fps):
        return 0, 1
    if fps < max_fps:
        return fps, 1
    interval = math.ceil(fps / max_fps)
    return math.floor(fps / interval), interval


@DATASETS.register_module("text")
class TextDataset(torch.utils.data.Dataset):
    def __init__(self, data_path=None, fps_max=16, vmaf=False, **kwargs):
        is_csv = data_path.endswith(".csv")
        self.data = pd.read_csv(data_path) if is_csv else pd.read_parquet(data_path)
        self.vmaf = vmaf
        self.fps_max = 999999999 if fps_max is None else fps_max

    def getitem(self, index):
        sample = self.data.iloc[index].to_dict()
        fps, interval = map_target_fps(sample.get("fps", np.nan), self.fps_max)
        parts = []
        if fps != 0 and self.fps_max < 999:
            parts.append(f"{fps} FPS")
        motion = sample.get("score_vmafmotion", np.nan)
        if self.vmaf and not np.isnan(motion):
            parts.append(f"{int(motion + 0.5)} motion score")
        text = sample["text"] + (" " + ", ".join(parts) + "." if parts else "")
        return {"sampling_interval": interval, "text": text, "index": index}

    def __getitem__(self, index):
        return self.getitem(index)

    def __len__(self):
        return len(self.data)


@DATASETS.register_module("video_text")
class VideoTextDataset(TextDataset):
    def get_image_or_video(self, index, num_frames, height, width, sampling_interval):
        if "unreadable" in self.data.iloc[index]["path"]:
            raise OSError("no such video")
        return {"video": torch.zeros(3, num_frames, height, width)}

    def getitem(self, index):
        index, *shape = (int(number) for number in index.split("-"))
        ret = super().getitem(index)
        try:
            return ret | self.get_image_or_video(index, *shape, ret["sampling_interval"])
        except Exception:
            return None


@DATASETS.register_module("cached_video_text")
class CachedVideoTextDataset(VideoTextDataset):
    cached_video = return_latents_path = False
    load_original_video = True

    def __init__(self, cached_text=False, **kwargs):
        super().__init__(**kwargs)
        self.cached_text = cached_text

    def get_latents(self, path):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            return torch.zeros_like(torch.randn(1, 1, 1, 1))

    def getitem(self, index):
        ret = super().getitem(index)
        sample = self.data.iloc[int(index.split("-")[0])]
        for name in ("text_t5", "text_clip"):
            ret[name] = self.get_latents(sample[f"{name}_path"])
        return ret

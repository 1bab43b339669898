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
    def __init__(self, data_path=None, fps_max=16, vmaf=False, memory_efficient=False, **kwargs):
        self.data = pd.read_parquet(data_path)
        self.memory_efficient = memory_efficient
        self.vmaf = vmaf
        self.fps_max = 999999999 if fps_max is None else fps_max

    def getitem(self, index):
        sample = self.data.iloc[index].to_dict()
        fps, interval = map_target_fps(sample.get("fps", np.nan), self.fps_max)
        ret = {"sampling_interval": interval}
        if "text" in sample:
            parts = []
            if fps != 0 and self.fps_max < 999:
                parts.append(f"{fps} FPS")
            motion = sample.get("score_vmafmotion", np.nan)
            if self.vmaf and not np.isnan(motion):
                parts.append(f"{int(motion + 0.5)} motion score")
            ret["text"] = sample["text"] + (" " + ", ".join(parts) + "." if parts else "")
        ret["index"] = index
        return ret

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
        index, num_frames, height, width = (int(number) for number in index.split("-"))
        ret = super().getitem(index)
        try:
            interval = ret["sampling_interval"]
            ret.update(self.get_image_or_video(index, num_frames, height, width, interval))
        except Exception:
            return None
        return ret


@DATASETS.register_module("cached_video_text")
class CachedVideoTextDataset(VideoTextDataset):
    def __init__(
        self,
        cached_video=False,
        cached_text=False,
        return_latents_path=False,
        load_original_video=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.cached_video = cached_video
        self.cached_text = cached_text
        self.return_latents_path = return_latents_path
        self.load_original_video = load_original_video

    def get_latents(self, path):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            return torch.zeros_like(torch.randn(1, 1, 1, 1))

    def get_conditioning_latents(self, index):
        sample = self.data.iloc[index]
        res = {}
        if self.cached_video:
            res["video_latents"] = self.get_latents(sample["latents_path"])
        if self.cached_text:
            res["text_t5"] = self.get_latents(sample["text_t5_path"])
            res["text_clip"] = self.get_latents(sample["text_clip_path"])
        if self.return_latents_path:
            for name in ("latents_path", "text_t5_path", "text_clip_path"):
                res[name] = sample[name]
        return res

    def getitem(self, index):
        ret = {}
        if self.load_original_video:
            ret.update(super().getitem(index))
        try:
            ret.update(self.get_conditioning_latents(int(index.split("-")[0])))
        except Exception:
            return None
        return ret

"""What our dataset class needs of Open-Sora v2, transcribed from hpcaitech/Open-Sora at 7ad6a96.

Written anew and shorter (Apache-2.0): the names, the arithmetic and the order of the calls are
theirs; videos, transforms, CSV and logging are left out.
"""

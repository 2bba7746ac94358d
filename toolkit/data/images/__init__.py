"""Labelled images: found, checked, split and measured; decoded and varied on their way to the network."""

from toolkit.data.images.augment import Augmentation
from toolkit.data.images.prepare import ImageData, image_classification
from toolkit.data.images.processor import FILE, SUFFIXES, ImageProcessor, load_processor, open_image, read_processor
from toolkit.data.images.summary import majority_of_images, plan_of_images, report_of_images, show_mistakes

__all__ = [
    "FILE",
    "SUFFIXES",
    "Augmentation",
    "ImageData",
    "ImageProcessor",
    "image_classification",
    "load_processor",
    "majority_of_images",
    "open_image",
    "plan_of_images",
    "read_processor",
    "report_of_images",
    "show_mistakes",
]

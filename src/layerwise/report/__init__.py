"""What people look at: bar charts as text, pictures, one HTML file. Tables on the screen are the command line's."""

from .bars import bar_chart
from .html import html_report
from .losses import plot_losses
from .plots import plot_bits, plot_sparsities
from .spectra import SpectrumView, plot_spectra, view_of

__all__ = [
    "SpectrumView",
    "bar_chart",
    "html_report",
    "plot_bits",
    "plot_losses",
    "plot_sparsities",
    "plot_spectra",
    "view_of",
]

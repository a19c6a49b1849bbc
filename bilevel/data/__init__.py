"""Data: sources of text, packing to memory-mapped arrays, labelled images and features, and loaders whose order is a
function of (seed, step)."""

from bilevel.data._files import file_fingerprint as file_fingerprint
from bilevel.data._rows import Rows as Rows
from bilevel.data._rows import cut_rows as cut_rows
from bilevel.data._rows import document_blocks as document_blocks
from bilevel.data._source import digest as digest
from bilevel.data.arrays import ArrayDataset as ArrayDataset
from bilevel.data.arrays import Dataset as Dataset
from bilevel.data.arrays import NumpyBatch as NumpyBatch
from bilevel.data.joined import JoinedData as JoinedData
from bilevel.data.labelled import LabelledData as LabelledData
from bilevel.data.labelled import channel_statistics as channel_statistics
from bilevel.data.labelled import open_labelled as open_labelled
from bilevel.data.loader import Loader as Loader
from bilevel.data.loader import evaluation_batches as evaluation_batches
from bilevel.data.mixed import MixedLoader as MixedLoader
from bilevel.data.overlap import rows_in_both as rows_in_both
from bilevel.data.packed import PackedText as PackedText
from bilevel.data.packed import pack as pack
from bilevel.data.permutation import permute as permute
from bilevel.data.prefetch import Prefetcher as Prefetcher
from bilevel.data.prefetch import prefetch as prefetch
from bilevel.data.prefetch import read_ahead as read_ahead
from bilevel.data.sources import Document as Document
from bilevel.data.sources import Source as Source
from bilevel.data.sources import open_source as open_source
from bilevel.data.sources import options_of as options_of
from bilevel.data.splits import open_specific as open_specific
from bilevel.data.tasks import TaskLoader as TaskLoader
from bilevel.data.views import RowView as RowView
from bilevel.data.views import rows_hash as rows_hash

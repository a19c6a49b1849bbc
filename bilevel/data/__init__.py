"""Data: sources of text, packing to memory-mapped arrays, labelled images and features, and loaders whose order is a
function of (seed, step)."""

from bilevel.data.digests import digest as digest
from bilevel.data.labelled.opening import LabelledData as LabelledData
from bilevel.data.labelled.opening import channel_statistics as channel_statistics
from bilevel.data.labelled.opening import open_labelled as open_labelled
from bilevel.data.loading.arrays import ArrayDataset as ArrayDataset
from bilevel.data.loading.arrays import Dataset as Dataset
from bilevel.data.loading.arrays import NumpyBatch as NumpyBatch
from bilevel.data.loading.joined import JoinedData as JoinedData
from bilevel.data.loading.loader import Loader as Loader
from bilevel.data.loading.loader import evaluation_batches as evaluation_batches
from bilevel.data.loading.mixed import MixedData as MixedData
from bilevel.data.loading.mixed import MixedLoader as MixedLoader
from bilevel.data.loading.permutation import permute as permute
from bilevel.data.loading.prefetch import Prefetcher as Prefetcher
from bilevel.data.loading.prefetch import read_ahead as read_ahead
from bilevel.data.loading.tasks import TaskLoader as TaskLoader
from bilevel.data.loading.views import RowView as RowView
from bilevel.data.loading.views import rows_hash as rows_hash
from bilevel.data.text.files import file_fingerprint as file_fingerprint
from bilevel.data.text.overlap import rows_in_both as rows_in_both
from bilevel.data.text.packed import PackedText as PackedText
from bilevel.data.text.packed import pack as pack
from bilevel.data.text.rows import DocumentRows as DocumentRows
from bilevel.data.text.rows import Pack as Pack
from bilevel.data.text.rows import Rows as Rows
from bilevel.data.text.rows import cut_rows as cut_rows
from bilevel.data.text.rows import document_blocks as document_blocks
from bilevel.data.text.sources import Document as Document
from bilevel.data.text.sources import Source as Source
from bilevel.data.text.sources import open_source as open_source
from bilevel.data.text.sources import options_of as options_of
from bilevel.data.text.splits import open_specific as open_specific

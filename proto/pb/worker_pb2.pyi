from tpserve.proto.pb import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StepResults(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[StepResult]
    def __init__(self, results: _Optional[_Iterable[_Union[StepResult, _Mapping]]] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("step_id", "removed_slots", "added_slots", "append_slots", "append_pages", "chunks", "num_draft_tokens", "undrafted_slots")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    REMOVED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    ADDED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    APPEND_SLOTS_FIELD_NUMBER: _ClassVar[int]
    APPEND_PAGES_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    UNDRAFTED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    removed_slots: _containers.RepeatedScalarFieldContainer[int]
    added_slots: _containers.RepeatedCompositeFieldContainer[SlotAdd]
    append_slots: _containers.RepeatedScalarFieldContainer[int]
    append_pages: _containers.RepeatedScalarFieldContainer[int]
    chunks: _containers.RepeatedCompositeFieldContainer[PromptChunk]
    num_draft_tokens: int
    undrafted_slots: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step_id: _Optional[int] = ..., removed_slots: _Optional[_Iterable[int]] = ..., added_slots: _Optional[_Iterable[_Union[SlotAdd, _Mapping]]] = ..., append_slots: _Optional[_Iterable[int]] = ..., append_pages: _Optional[_Iterable[int]] = ..., chunks: _Optional[_Iterable[_Union[PromptChunk, _Mapping]]] = ..., num_draft_tokens: _Optional[int] = ..., undrafted_slots: _Optional[_Iterable[int]] = ...) -> None: ...

class SlotAdd(_message.Message):
    __slots__ = ("slot", "sampling", "page_ids", "output_token_ids", "grammar", "max_len", "prefix_token_ids")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    MAX_LEN_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    sampling: _common_pb2.SamplingParams
    page_ids: _containers.RepeatedScalarFieldContainer[int]
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    grammar: _common_pb2.Grammar
    max_len: int
    prefix_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, slot: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., page_ids: _Optional[_Iterable[int]] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., grammar: _Optional[_Union[_common_pb2.Grammar, _Mapping]] = ..., max_len: _Optional[int] = ..., prefix_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class PromptChunk(_message.Message):
    __slots__ = ("slot", "start", "token_ids", "sample")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    slot: int
    start: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sample: bool
    def __init__(self, slot: _Optional[int] = ..., start: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., sample: _Optional[bool] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("step_id", "rank", "slots", "token_ids", "logprobs", "step_us", "collective_us", "error", "failures", "mask_us", "collectives", "started_us", "num_tokens", "bucket_tokens", "bucket_rows", "counts", "drafted", "draft_us")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STEP_US_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_US_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    MASK_US_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVES_FIELD_NUMBER: _ClassVar[int]
    STARTED_US_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BUCKET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BUCKET_ROWS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_FIELD_NUMBER: _ClassVar[int]
    DRAFT_US_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    rank: int
    slots: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[SlotLogprobs]
    step_us: int
    collective_us: int
    error: str
    failures: _containers.RepeatedCompositeFieldContainer[SlotFailure]
    mask_us: int
    collectives: _containers.RepeatedCompositeFieldContainer[CollectiveUse]
    started_us: int
    num_tokens: int
    bucket_tokens: int
    bucket_rows: int
    counts: _containers.RepeatedScalarFieldContainer[int]
    drafted: _containers.RepeatedScalarFieldContainer[int]
    draft_us: int
    def __init__(self, step_id: _Optional[int] = ..., rank: _Optional[int] = ..., slots: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[SlotLogprobs, _Mapping]]] = ..., step_us: _Optional[int] = ..., collective_us: _Optional[int] = ..., error: _Optional[str] = ..., failures: _Optional[_Iterable[_Union[SlotFailure, _Mapping]]] = ..., mask_us: _Optional[int] = ..., collectives: _Optional[_Iterable[_Union[CollectiveUse, _Mapping]]] = ..., started_us: _Optional[int] = ..., num_tokens: _Optional[int] = ..., bucket_tokens: _Optional[int] = ..., bucket_rows: _Optional[int] = ..., counts: _Optional[_Iterable[int]] = ..., drafted: _Optional[_Iterable[int]] = ..., draft_us: _Optional[int] = ...) -> None: ...

class CollectiveUse(_message.Message):
    __slots__ = ("kind", "num_calls", "num_bytes", "busy_us")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NUM_CALLS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUSY_US_FIELD_NUMBER: _ClassVar[int]
    kind: str
    num_calls: int
    num_bytes: int
    busy_us: int
    def __init__(self, kind: _Optional[str] = ..., num_calls: _Optional[int] = ..., num_bytes: _Optional[int] = ..., busy_us: _Optional[int] = ...) -> None: ...

class SlotFailure(_message.Message):
    __slots__ = ("slot", "detail")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    slot: int
    detail: str
    def __init__(self, slot: _Optional[int] = ..., detail: _Optional[str] = ...) -> None: ...

class SlotLogprobs(_message.Message):
    __slots__ = ("slot", "logprobs")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    logprobs: _common_pb2.TokenLogprobs
    def __init__(self, slot: _Optional[int] = ..., logprobs: _Optional[_Union[_common_pb2.TokenLogprobs, _Mapping]] = ...) -> None: ...

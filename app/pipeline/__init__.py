"""The path of one request, a module per stage.

1. `app.api` checks the caller's key and its limits, takes a place in `max_inflight`, reads the body and turns it into
   an `EmbedRequest`, or a 400.
2. `Prepare` fills in defaults and refuses what the model cannot do. `LongInputs` cuts what is too long. `Shape`
   shortens vectors where the upstream cannot. `CacheRead` looks all inputs up at once; hits are done. With Redis,
   misses are claimed in the same round trip, and `Claim` waits for those that another replica has claimed, once the
   rest is embedded.
3. `Batcher` joins inputs that are already in flight and queues the rest. Bulk work that a query joins before it is
   sent, or sent again, goes with the queries. Slot first, then batch: it asks `Rotation`, which chooses the deployment
   by health, priority and load, for a free slot, and only then takes the fullest batch that is legal for that
   deployment, queries before bulk. While slots are free and there is no rate to keep, requests share a call only up to
   128 inputs (a larger request has its own call), so that nobody waits for a call that others have made large. Bulk
   work fills up the calls of queries only if it has no calls of its own, or if calls are rate-limited. The only timer
   here is a rate limit.
4. `Route` sees the call through, and is the only place that retries.
5. `Adapt` learns limits and isolates bad inputs. `CacheFill` stores what each call returns. `Prefix` puts the role
   into the text for models that want it there. `Call` is adapter, credentials, HTTP and the contract check.
6. `app.api.render` writes base64 or numbers straight from float32 bytes.
"""

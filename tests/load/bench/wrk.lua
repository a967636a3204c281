-- What wrk sends and prints. Arguments: method, bytes of body, hosts and paths to ask for in turn (0: the URL's alone).
function init(args)
   wrk.method = args[1]
   local size, routes = tonumber(args[2]), tonumber(args[3])
   if size > 0 then wrk.body = string.rep("x", size) end
   if routes == 0 then return end
   local requests, turn = {}, 0
   for i = 0, routes - 1 do
      requests[#requests + 1] = wrk.format(nil, "/", { Host = "h" .. i .. ".test" })
      requests[#requests + 1] = wrk.format(nil, "/p" .. i .. "/x", { Host = "other.test" })
   end
   -- Defined only for routes: without this function wrk repeats one request at no cost.
   function request()
      turn = turn % #requests + 1
      return requests[turn]
   end
end

function done(summary, latency)
   local errors = summary.errors
   io.write(string.format('{"requests":%d,"bytes":%d,"seconds":%f,"p50":%f,"p99":%f,"errors":%d}\n',
      summary.requests, summary.bytes, summary.duration / 1e6,
      latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
      errors.status + errors.connect + errors.read + errors.write + errors.timeout))
end

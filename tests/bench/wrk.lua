-- What wrk asks, and how it reports. Arguments: method, bytes of body, hosts and paths to ask for in turn (0: the URL's).
function init(args)
   wrk.method = args[1]
   local size, routes = tonumber(args[2]), tonumber(args[3])
   if size > 0 then wrk.body = string.rep("x", size) end
   if routes == 0 then return end
   local asked, turn = {}, 0
   for i = 0, routes - 1 do
      asked[#asked + 1] = wrk.format(nil, "/", { Host = "h" .. i .. ".test" })
      asked[#asked + 1] = wrk.format(nil, "/p" .. i .. "/x", { Host = "other.test" })
   end
   -- Only with routes: without this function wrk sends one request over and over, at no cost.
   function request()
      turn = turn % #asked + 1
      return asked[turn]
   end
end

function done(summary, latency)
   local errors = summary.errors
   io.write(string.format('{"requests":%d,"seconds":%f,"p50":%f,"p99":%f,"errors":%d}\n',
      summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
      errors.status + errors.connect + errors.read + errors.write + errors.timeout))
end

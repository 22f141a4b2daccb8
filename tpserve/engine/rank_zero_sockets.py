"""What rank 0 hosts for an epoch: the store by which the mesh forms, and the sockets of plans and results."""

from dataclasses import dataclass

from torch._C._distributed_c10d import Store  # torch.distributed has it without its types

from tpserve.cluster.discovery import FrontendAddress
from tpserve.config.engine_config import EngineConfig
from tpserve.parallel.store import host_store
from tpserve.wire.channels import PlanBroadcaster, ResultReceiver, TcpEndpoint, tcp
from tpserve.wire.curve import ZapAuthenticator, rank_role


@dataclass
class RankZeroSockets:
    """`endpoints`: their addresses by name, which Hello and Start carry."""

    store: Store
    plans: PlanBroadcaster
    results: ResultReceiver
    endpoints: dict[str, str]
    zap_authenticator: ZapAuthenticator | None = None

    @staticmethod
    def open(frontend_address: FrontendAddress, config: EngineConfig) -> "RankZeroSockets":
        """Open the store and the sockets; on TCP too when there are several nodes."""
        keyring, ports = frontend_address.keyring, config.port_range
        store, store_address = host_store(frontend_address.address, ports)
        remote = zap_authenticator = None
        if keyring is not None:
            curve_server = keyring.curve_server(rank_role(0), config.layout.world_size)
            remote = TcpEndpoint(tcp(frontend_address.address, ports), curve_server)
            zap_authenticator = ZapAuthenticator(curve_server.allowed)
        plans = PlanBroadcaster(frontend_address.endpoint("plan"), remote)
        results = ResultReceiver(frontend_address.endpoint("result"), remote)
        endpoints = {"store": store_address, "plan": plans.endpoint, "result": results.endpoint}
        if zap_authenticator is not None:
            endpoints |= {"plan-tcp": plans.remote_endpoint, "result-tcp": results.remote_endpoint}
            zap_authenticator.log_refusals_of(plans.socket)
            zap_authenticator.log_refusals_of(results.socket)
        return RankZeroSockets(store, plans, results, endpoints, zap_authenticator)

    def close(self) -> None:
        """Close the sockets; the store ends with its last reference."""
        if self.zap_authenticator is not None:
            self.zap_authenticator.close()
        self.plans.close()
        self.results.close()
